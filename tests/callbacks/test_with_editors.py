"""Each regulariser in a fit of an editor, on a model whose layers keep [in, out] and on one whose layers keep [out, in]."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from rect_lightning.callbacks import PCA, PRUNE, RECT, SPHERE, FrobeniusNorm, NullSpace, Random, Shrink
from rect_lightning.solving.moments import second_moments
from tests.callbacks.test_projections import restrained, suppressed
from tests.callbacks.training import truncated
from tests.editors.test_base import (
    FAMILIES,
    facts,
    fit,
    identical,
    memit,
    record_updates,
    rome,
    state,
    trainer,
)
from tests.solving.test_relative_change import naive_mask


def projected(update, c, energy):
    """``ΔW P``, written out."""
    values, vectors = torch.linalg.eigh(c.double())
    share = values.cumsum(0) / values.sum()
    basis = vectors[:, share <= energy]
    assert 0 < basis.shape[1] < len(c)
    return (update.double() @ basis @ basis.T).float()


def shrunk(update, before, keep):
    return update * (update[naive_mask(update, before, keep)].norm() / update.norm())


# what each leaves of an update [out, in], given the weight before it and the keys' second moments
CASES = {
    "PCA": (partial(PCA, 0.4), lambda u, w, c: truncated(u, 1)),  # of rank 3, one a request
    "Shrink": (partial(Shrink, like_rect=0.4), lambda u, w, c: shrunk(u, w, 0.4)),
    "FrobeniusNorm": (partial(FrobeniusNorm, 0.1), lambda u, w, c: u * min(1, 0.1 * w.norm() / u.norm())),
    "PRUNE": (partial(PRUNE, base=4.0), lambda u, w, c: restrained(u, w, 4.0)[0]),
    "SPHERE": (SPHERE, lambda u, w, c: suppressed(u, w, 0.5, 0.5)),
    "NullSpace": (partial(NullSpace, energy=0.3), lambda u, w, c: projected(u, c, 0.3)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_of_each_layer_s_update(tmp_path, monkeypatch, family, step_per, name):
    make, expected = CASES[name]
    strength = 8.0 if name == "PRUNE" else 1.0
    editor = memit(tmp_path, family, step_per=step_per, strength=strength)
    recorded = record_updates(editor, monkeypatch)
    run = fit(editor, facts(tmp_path, batch_size=3), make(), limit_train_batches=1, limit_val_batches=0)
    model = editor.model
    found = {layer: model.oriented(layer, model.weight(layer).detach()).clone() for layer in editor.layers}
    editor.restore()
    moments = second_moments(model, editor.layers, editor.moments, fingerprint=editor.fingerprint)
    assert [layer for layer, *_ in recorded] == editor.layers
    for layer, update, *_ in recorded:
        before = model.oriented(layer, editor.clean[layer])
        whole = strength * update.float()
        left = expected(whole, before, moments[layer])
        torch.testing.assert_close(found[layer] - before, left, atol=2e-5 * strength, rtol=1e-3)
        if name != "FrobeniusNorm":
            assert (left - whole).norm() > 1e-3 * whole.norm(), "nothing is taken away"
        share = float(left.norm() / whole.norm())
        logged = run.callback_metrics[f"{name.lower()}/network.{model.projection_name(layer)}.weight/norm"]
        assert float(logged) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_keeps_its_share_of_each_layer(tmp_path, family):
    editor = memit(tmp_path, family)
    fit(editor, facts(tmp_path, batch_size=3), Random(0.3), limit_train_batches=1, limit_val_batches=0)
    for layer, clean in editor.clean.items():
        assert int((editor.model.weight(layer) != clean).sum()) == round(0.3 * clean.numel())


def test_pca_leaves_rome_s_update_as_it_is(tmp_path):
    plain, edited = rome(tmp_path), rome(tmp_path)
    fit(plain, facts(tmp_path), limit_train_batches=1, limit_val_batches=0)
    fit(edited, facts(tmp_path), PCA(0.4), limit_train_batches=1, limit_val_batches=0)
    torch.testing.assert_close(edited.model.weight(1), plain.model.weight(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("step_per", "max_steps", "steps"), [("layer", -1, 5 * 4 * 2), ("operation", -1, 5 * 4), ("layer", 32, 32)]
)
def test_the_first_tenth_of_a_run_is_counted_in_the_editor_s_own_steps(tmp_path, step_per, max_steps, steps):
    """One for each layer of an operation, or one for all."""
    method = RECT(0.4, scope="run")
    fit(memit(tmp_path, step_per=step_per), facts(tmp_path), method, max_epochs=5, max_steps=max_steps)
    assert method.state_dict()["start"] == steps // 10
    assert method.state_dict()["steps"] == [steps]


MAKERS = {name: make for name, (make, _) in CASES.items()} | {
    "Random": partial(Random, 0.4),
    "FrobeniusNorm of a run": partial(FrobeniusNorm, 0.05, scope="run"),
    "RECT and NullSpace": lambda: (RECT(0.4), NullSpace(energy=0.3)),
}


def several(made):
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_fit_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, name):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    whole, resumed = memit(tmp_path), memit(tmp_path)
    fit(whole, facts(tmp_path), *several(MAKERS[name]()))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(memit(tmp_path), facts(tmp_path), *several(MAKERS[name]()), Stop())
    again = trainer(*several(MAKERS[name]()))
    again.fit(resumed, datamodule=facts(tmp_path), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.done == ["a", "b", "c", "d"]
    assert identical(state(resumed), state(whole))


def test_prune_over_all_edits_is_of_what_they_have_changed_together(tmp_path):
    plain, edited = memit(tmp_path, strength=4.0), memit(tmp_path, strength=4.0)
    fit(plain, facts(tmp_path), limit_val_batches=0)
    fit(edited, facts(tmp_path), PRUNE(base=4.0), limit_val_batches=0)
    counts = []
    for layer, clean in plain.clean.items():
        expected, count = restrained(plain.model.weight(layer).detach() - clean, clean, 4.0)
        torch.testing.assert_close(edited.model.weight(layer) - clean, expected, atol=1e-4, rtol=1e-3)
        counts.append(count)
    assert max(counts) > 0


def test_single_mode_regularises_each_operation_before_it_is_measured(tmp_path):
    """Also what is otherwise left to the end of a run."""
    for callback in (PRUNE(base=4.0), NullSpace(energy=0.3)):
        single, plain = memit(tmp_path, mode="single", strength=4.0), memit(tmp_path, mode="single", strength=4.0)
        fit(single, facts(tmp_path), callback)
        fit(plain, facts(tmp_path))
        assert single.is_clean()
        assert json.dumps(single.results["after"]) != json.dumps(plain.results["after"])
