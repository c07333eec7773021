"""AlphaEdit's update against the paper's formula, what it preserves, and what it remembers."""

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from rect_lightning.callbacks import RECT
from rect_lightning.editors import AlphaEdit
from rect_lightning.models import Source
from rect_lightning.solving.moments import second_moments
from tests.editors.test_base import (
    FAMILIES,
    Failing,
    facts,
    fit,
    identical,
    locate_then_edit,
    record_updates,
    state,
    trainer,
)
from tests.editors.test_interruptions import FailsOnce, SavesInTheMiddle
from tests.editors.test_memit import keys_and_residuals, relative

ENERGY = 0.3  # of the tiny models' keys in what counts as the null space


def alphaedit(folder, family="llama", **options):
    return locate_then_edit(
        AlphaEdit, folder, family, **({"layers": [1, 2], "energy": ENERGY, "ridge": 0.01} | options)
    )


def moments_of(editor):
    with editor.clean_weights():
        found = second_moments(editor.model, editor.layers, editor.moments, fingerprint=editor.fingerprint)
    return {layer: c.double() for layer, c in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_each_layer_s_update_is_the_paper_s(tmp_path, monkeypatch, family, step_per):
    editor = alphaedit(tmp_path, family, step_per=step_per)
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=2), limit_val_batches=0)
    editor.restore()
    projectors = {}
    for layer, c in moments_of(editor).items():
        values, vectors = torch.linalg.eigh(c)
        small = vectors[:, values.cumsum(0) <= ENERGY * values.sum()]
        assert 0 < small.shape[1] < len(c)
        projectors[layer] = small @ small.T
    past = {layer: [] for layer in editor.layers}
    assert [layer for layer, *_ in updates] == [1, 2, 1, 2]
    for layer, update, batch, found in updates:
        k, r = keys_and_residuals(editor, layer, batch, found.stream + found.offset)
        p, before = projectors[layer], torch.cat([k.new_zeros(len(k), 0), *past[layer]], dim=1)
        ridge = 0.01 * torch.eye(len(k)).double()
        expected = r @ k.T @ p @ torch.linalg.inv(before @ before.T @ p + k @ k.T @ p + ridge)
        assert relative(update, expected) < 1e-4
        if past[layer]:
            assert relative(update, r @ k.T @ p @ torch.linalg.inv(k @ k.T @ p + ridge)) > 1e-3
        past[layer].append(k)
        editor.model.weight(layer).data += editor.model.oriented(layer, update).float()


@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("keep", [1.0, 0.1])
def test_the_keys_remembered_are_those_of_the_model_that_the_operation_has_made(tmp_path, step_per, keep):
    """Also where RECT has left little of the layers before."""
    editor, data = alphaedit(tmp_path, step_per=step_per), facts(tmp_path, batch_size=4)
    fit(editor, data, RECT(keep), limit_val_batches=0)
    solved_for = alphaedit(tmp_path)
    fit(solved_for, facts(tmp_path, batch_size=4), limit_val_batches=0)
    for layer, c in moments_of(editor).items():
        values, vectors = torch.linalg.eigh(c)
        small = vectors[:, values.cumsum(0) <= ENERGY * values.sum()]
        k, _ = keys_and_residuals(editor, layer, data.requests, torch.zeros(4, 1))  # residuals are not asked for
        expected = small @ small.T @ k @ k.T @ small @ small.T
        assert relative(editor.memory[f"past_keys.{layer}"], expected) < 1e-4
        if keep < 1 and layer == 2:
            assert relative(solved_for.memory[f"past_keys.{layer}"], expected) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_preserved_keys_keep_their_values(tmp_path, family):
    """Keys in the span of the large eigenvectors have the values they had, to the last digits of fp32."""
    editor = alphaedit(tmp_path, family)
    fit(editor, facts(tmp_path, batch_size=2), limit_val_batches=0)
    for layer, c in moments_of(editor).items():
        values, vectors = torch.linalg.eigh(c)
        large = vectors[:, values.cumsum(0) > ENERGY * values.sum()]
        change = editor.model.oriented(layer, editor.model.weight(layer) - editor.clean[layer]).detach().double()
        assert (change @ large).norm() < 1e-6 * change.norm()
        small = vectors[:, values.cumsum(0) <= ENERGY * values.sum()]
        assert relative((change @ small).norm(), change.norm()) < 1e-6


def test_past_edits_are_preserved(tmp_path, monkeypatch):
    """A later operation moves the values of earlier keys much less than it would without remembering them."""
    moved = {}
    for remembers in (True, False):
        editor = alphaedit(tmp_path, layers=[2], ridge=1e-4)
        updates = record_updates(editor, monkeypatch)
        solve = editor.solve

        def forgetful(layer, residuals, keys, editor=editor, solve=solve):
            editor.memory = {}
            return solve(layer, residuals, keys)

        if not remembers:
            monkeypatch.setattr(editor, "solve", forgetful)
        fit(editor, facts(tmp_path, batch_size=2), limit_val_batches=0)
        (_, _, batch, found), (_, second, *_) = updates
        editor.restore()
        keys, _ = keys_and_residuals(editor, 2, batch, found.stream)
        moved[remembers] = float((second @ keys).norm() / second.norm())
    assert moved[True] < 0.05 * moved[False]


def test_all_at_once_and_one_after_the_other_are_as_large_in_memory(tmp_path):
    sizes = []
    for limit in (1, 4):
        editor = alphaedit(tmp_path)
        fit(editor, facts(tmp_path, limit=limit), limit_val_batches=0)
        sizes.append({name: (x.shape, x.dtype) for name, x in editor.memory.items()})
    assert sizes[0] == sizes[1] == {f"past_keys.{n}": (torch.Size([96, 96]), torch.float64) for n in (1, 2)}


@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_single_mode_has_no_keys_of_the_past(tmp_path, monkeypatch, step_per):
    editor = alphaedit(tmp_path, mode="single", step_per=step_per)
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path), RECT(0.8))
    assert editor.memory == {}
    assert editor.results["after"]["efficacy/exact"] == 1
    alone = alphaedit(tmp_path, step_per=step_per)
    data = facts(tmp_path)
    (tmp_path / "facts.jsonl").write_text((tmp_path / "facts.jsonl").read_text().splitlines()[3] + "\n")
    expected = record_updates(alone, monkeypatch)
    fit(alone, data, RECT(0.8), limit_val_batches=0)
    assert relative(updates[-2][1], expected[0][1]) < 1e-5


# What is remembered, when something stops --------------------------------------------------------------------------


def same_memory(a, b):
    return identical(a.memory, b.memory) and len(a.memory) == len(a.layers)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failed_operation_leaves_no_past_keys(tmp_path, monkeypatch, layer):
    editor, once = alphaedit(tmp_path), alphaedit(tmp_path)
    Failing(editor, monkeypatch, float("nan"), operation=1, layer=layer)
    with pytest.raises(RuntimeError, match="not finite"):
        fit(editor, facts(tmp_path, batch_size=2))
    fit(once, facts(tmp_path, batch_size=2), limit_train_batches=1, limit_val_batches=0)
    assert same_memory(editor, once)
    assert identical(state(editor), state(once))


@pytest.mark.parametrize("stopped", ["failed", "saved in the middle"])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path, stopped):
    whole, broken, resumed = (alphaedit(tmp_path) for _ in range(3))
    fit(whole, facts(tmp_path), RECT(0.4))
    if stopped == "failed":
        path = tmp_path / "on_exception.ckpt"
        with pytest.raises(RuntimeError, match="power cut"):
            fit(
                broken, facts(tmp_path), RECT(0.4), FailsOnce(), OnExceptionCheckpoint(tmp_path),
                enable_checkpointing=True,
            )  # fmt: skip
    else:
        path = tmp_path / "middle.ckpt"
        fit(broken, facts(tmp_path), RECT(0.4), SavesInTheMiddle(path))
    once = alphaedit(tmp_path)
    fit(once, facts(tmp_path, limit=2 if stopped == "failed" else 1), RECT(0.4), limit_val_batches=0)
    saved = torch.load(path, weights_only=True)
    assert identical(saved["memory"], once.memory)
    trainer(RECT(0.4)).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert identical(state(resumed), state(whole))
    assert same_memory(resumed, whole)


def test_another_model_is_edited_without_the_past_of_the_first(tmp_path):
    editor = alphaedit(tmp_path)
    fit(editor, facts(tmp_path), limit_val_batches=0)
    assert editor.memory
    editor.attach(editor.network, editor.model.tokenizer)
    assert editor.memory == {}
    assert editor.projectors == {}


@pytest.mark.parametrize(("options", "message"), [
    ({"ridge": 0.0}, "ridge must be positive; got 0.0"),
    ({"threshold": -1.0}, "threshold must be positive; got -1.0"),
    ({"energy": 1.0}, "energy is a share, above 0 and below 1; got 1.0"),
    ({"energy": 0.0}, "energy is a share"),
    ({"moments": None}, "AlphaEdit needs second moments"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaEdit(base=Source(name="tiny"), layers=[1], **options)


def test_a_threshold_below_all_eigenvalues_is_refused_by_the_layer_s_name(tmp_path):
    editor = alphaedit(tmp_path, energy=None, threshold=1e-30)
    with pytest.raises(ValueError, match=r"Layer 1: No eigenvalue .* threshold 1e-30"):
        fit(editor, facts(tmp_path))
    assert editor.is_clean()
