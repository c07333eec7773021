"""Regularisers that project, against their definitions in float64, in a small network under several optimizers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file

from rect_lightning.callbacks import PRUNE, RECT, SPHERE, FrobeniusNorm, NullSpace
from tests.callbacks.test_rect import assert_same
from tests.callbacks.training import BATCHES, KINDS, Model, adamw, fit, fit_with_a_stop, sgd, updates, weights

FAST = [
    lambda m: torch.optim.SGD(m.parameters(), 0.03, maximize=True),
    lambda m: torch.optim.AdamW(m.parameters(), 0.5),
]
NAMES = ("layers.0.weight", "layers.1.weight")


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("options", [{"limit": 0.01}, {"limit": 1e9}, {"limit": 0.02, "relative": False}], ids=str)
def test_a_step_stays_within_the_norm(optimizer, options):
    before, pairs, logged = updates(FrobeniusNorm(**options), optimizer)
    for name, (update, left) in pairs.items():
        radius = options["limit"] * (float(before[name].norm()) if options.get("relative", True) else 1)
        factor = min(1.0, radius / float(update.norm()))
        torch.testing.assert_close(left, factor * update, atol=1e-7, rtol=1e-4)
        assert float(left.norm()) <= radius * (1 + 1e-4)
        assert logged[f"frobeniusnorm/{name}/norm"] == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("optimizer", KINDS)
def test_a_run_stays_within_the_norm(optimizer):
    module, free = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free, steps=9)
    fit(module, FrobeniusNorm(0.01, scope="run", start_step=0), steps=9)
    for name, weight in weights(module).items():
        limit = 0.01 * float(before[name].norm())
        assert 0.5 * limit < float((weight - before[name]).norm()) <= limit * (1 + 1e-4)
        assert float((weights(free)[name] - before[name]).norm()) > 1.5 * limit


def restrained(update, before, base):
    """PRUNE's ΔW, written out."""
    u, s, vh = np.linalg.svd(update.double().numpy(), full_matrices=False)
    limit = np.linalg.svd(before.double().numpy(), compute_uv=False)[0]
    f = [min(x, math.log(x, base) - math.log(limit, base) + limit) if x > limit else x for x in s]
    return torch.from_numpy(u @ np.diag(f) @ vh).float(), int((s > limit).sum())


@pytest.mark.parametrize("optimizer", FAST)
@pytest.mark.parametrize("base", [math.e, 4.0, 1.2])
def test_prune_restrains_what_the_run_has_changed_once(optimizer, base, tmp_path):
    free, module = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free, steps=4)
    run = fit(module, PRUNE(base=base), steps=4)
    run.save_checkpoint(tmp_path / "a.ckpt")
    counts = []
    for name, weight in weights(free).items():
        if weight.ndim != 2:
            assert torch.equal(weights(module)[name], weight)
            continue
        expected, count = restrained(weight - before[name], before[name], base)
        left = weights(module)[name] - before[name]
        torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-4)
        limit = float(torch.linalg.matrix_norm(before[name], 2))
        most = float(torch.linalg.matrix_norm(weight - before[name], 2))
        bound = max(limit, min(most, limit + math.log(most / limit, base)))
        assert float(torch.linalg.matrix_norm(left, 2)) <= bound * (1 + 1e-5)
        assert run.callback_metrics[f"prune/{name}/restrained"] == count
        counts.append(count)
    assert max(counts) > 0
    again = Model(optimizer)  # that the run is over is known after it is resumed, too
    fit(again, PRUNE(base=base), steps=4, ckpt_path=tmp_path / "a.ckpt")
    assert_same(weights(again), weights(module))


def test_going_on_from_a_run_that_was_ended_is_told_to_restrain_twice(tmp_path):
    run = fit(Model(adamw), PRUNE(), steps=2)
    run.save_checkpoint(tmp_path / "ended.ckpt")
    with pytest.warns(
        UserWarning, match="PRUNE has acted when the run of this checkpoint ended, after 2 optimizer steps"
    ):
        fit(Model(adamw), PRUNE(), steps=4, ckpt_path=tmp_path / "ended.ckpt")


def test_a_run_that_was_killed_is_gone_on_with_in_silence(tmp_path, recwarn):
    class SaveLast(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.is_last_batch:
                trainer.save_checkpoint(tmp_path / "done.ckpt")

    assert_same(*map(weights, fit_with_a_stop(PRUNE, tmp_path)))
    fit(Model(adamw), PRUNE(), SaveLast(), max_epochs=1, steps=-1)
    states = torch.load(tmp_path / "done.ckpt")["callbacks"]
    assert [state["ended"] for key, state in states.items() if key.startswith("PRUNE")] == [True]
    fit(Model(adamw), PRUNE(), max_epochs=1, steps=-1, ckpt_path=tmp_path / "done.ckpt")
    assert not [w for w in recwarn if "has acted" in str(w.message)]


def test_prune_of_each_step():
    for optimizer in (*FAST, sgd):
        before, pairs, _ = updates(PRUNE(scope="step"), optimizer)
        for name in NAMES:
            update, left = pairs[name]
            torch.testing.assert_close(left, restrained(update, before[name], math.e)[0], atol=1e-5, rtol=1e-4)


def suppressed(update, before, energy, strength):
    """SPHERE's ΔW for ``[out, in]``, written out."""
    rows = before.double() / before.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    count = next(r for r in range(1, len(values) + 1) if values[:r].sum() >= energy * values.sum() * (1 - 1e-12))
    p = torch.eye(len(values)) - strength * vectors[:, :count] @ vectors[:, :count].T
    return (update.double() @ p).float()


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("options", [{}, {"energy": 0.9, "strength": 1.0}, {"energy": 1.0}], ids=str)
def test_sphere_suppresses_the_weight_s_leading_directions(optimizer, options):
    before, pairs, logged = updates(SPHERE(**options), optimizer)
    for name, (update, left) in pairs.items():
        if name in NAMES:
            expected = suppressed(update, before[name], **({"energy": 0.5, "strength": 0.5} | options))
            torch.testing.assert_close(left, expected, atol=1e-6, rtol=1e-3)
            share = float(expected.norm() / update.norm())
            assert logged[f"sphere/{name}/norm"] == pytest.approx(share, rel=1e-3, abs=1e-6)
        else:
            torch.testing.assert_close(left, update)


INPUTS = BATCHES[:, :3] @ torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


def moments_file(folder, kind):
    """The second moments of keys that span three of six dimensions, in a file of this kind."""
    path = folder / f"c.{kind}"
    total = INPUTS.double().T @ INPUTS.double()
    if kind == "npz":
        np.savez(path, **{"mom2.mom2": total.float().numpy(), "mom2.count": len(INPUTS)})
    else:
        save_file({"C": (total / len(INPUTS)).float()}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("scope", ["step", "run"])
def test_the_null_space_s_complement_keeps_its_values(kind, scope, tmp_path):
    module, free = Model(adamw), Model(adamw)
    before = weights(module)["layers.0.weight"]
    files = {"layers.0.weight": moments_file(tmp_path, kind)}
    fit(free, steps=5)
    fit(module, NullSpace(files=files, threshold=1e-4, scope=scope), steps=5)
    values = [INPUTS @ w.T for w in (before, weights(module)["layers.0.weight"], weights(free)["layers.0.weight"])]
    assert (values[1] - values[0]).abs().max() < 1e-6
    assert (values[2] - values[0]).abs().max() > 1e-2
    assert (weights(module)["layers.0.weight"] - before).norm() > 1e-2
    for name in ("layers.0.bias", "layers.1.weight"):
        assert (weights(module)[name] - dict(Model(adamw).named_parameters())[name]).norm() > 1e-2


def test_the_null_space_under_plain_sgd(tmp_path):
    _, pairs, _ = updates(NullSpace(files={NAMES[0]: moments_file(tmp_path, "npz")}, threshold=1e-4), sgd)
    q = torch.linalg.svd(INPUTS.double())[2][3:]
    update, left = pairs[NAMES[0]]
    torch.testing.assert_close(left, (update.double() @ q.T @ q).float(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(pairs[NAMES[1]][0], pairs[NAMES[1]][1])


def test_they_act_in_the_order_of_the_list(tmp_path):
    """What RECT masks after a projection is no projection any more, and the other way round is one."""
    limit, files = partial(FrobeniusNorm, 0.01), {NAMES[0]: moments_file(tmp_path, "npz")}
    null = partial(NullSpace, files=files, threshold=1e-4)
    for optimizer in KINDS:
        before, pairs, _ = updates(RECT(0.3), optimizer)
        masked = pairs[NAMES[0]][1]
        orders = {}
        for order in ("rect first", "null space first"):
            module = Model(optimizer)
            callbacks = [RECT(0.3), null(), limit()]
            fit(module, *(callbacks if order == "rect first" else [callbacks[1], callbacks[0], callbacks[2]]))
            orders[order] = weights(module)[NAMES[0]] - before[NAMES[0]]
            assert float(orders[order].norm()) <= 0.01 * float(before[NAMES[0]].norm()) * (1 + 1e-3)
        q = torch.linalg.svd(INPUTS.double())[2][3:]
        projected = masked.double() @ q.T @ q
        factor = min(1.0, 0.01 * float(before[NAMES[0]].norm()) / float(projected.norm()))
        torch.testing.assert_close(orders["rect first"].double(), factor * projected, atol=1e-6, rtol=1e-3)
        assert int((orders["null space first"] != 0).sum()) <= round(0.3 * 48)


MADE = {
    "FrobeniusNorm": partial(FrobeniusNorm, 0.05),
    "PRUNE": PRUNE,
    "SPHERE": SPHERE,
}


@pytest.mark.parametrize("options", [{"scope": "step"}, {"scope": "run"}, {"scope": "run", "start_step": 0}], ids=str)
@pytest.mark.parametrize("name", [*MADE, "NullSpace"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, options, tmp_path):
    make = MADE.get(name) or partial(NullSpace, files={NAMES[0]: moments_file(tmp_path, "npz")}, threshold=1e-4)
    whole, resumed = fit_with_a_stop(partial(make, **options), tmp_path, FAST[1])
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrobeniusNorm(0), "limit must be positive; got 0"),
        (lambda: FrobeniusNorm(math.nan), "limit must be positive; got nan"),
        (lambda: PRUNE(base=1.0), "above 1 such as 1.2; got 1.0"),
        (lambda: SPHERE(energy=50), "SPHERE's energy is a share"),
        (lambda: SPHERE(strength=0), "SPHERE's strength is a share"),
        (lambda: NullSpace(threshold=None), "got neither"),
        (lambda: NullSpace(energy=2), "between 0 and 1, such as 0.01; got 2"),
    ],
)
def test_refuses_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_what_has_no_linear_layer():
    with pytest.raises(ValueError, match=r"none of the chosen parameters is one; they are such as layers\.0\.bias"):
        fit(Model(adamw), SPHERE(parameters="*bias"))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (None, ValueError, "Model is no editor, whose layers' keys are known: give NullSpace `files`"),
        ({"layers.0.bias": "c.npz"}, ValueError, r"files has layers\.0\.bias, which is none of the chosen weights"),
        ({"layers.0.weight": "other.npz"}, FileNotFoundError, "There is no file .*other.npz of second moments"),
        ({"layers.1.weight": "c.npz"}, ValueError, r"\[6, 6\], but layers\.1\.weight has keys of width 8"),
        ({"layers.0.weight": "d.safetensors"}, ValueError, "no safetensors file with a tensor C"),
        ({"layers.0.weight": "full.safetensors"}, ValueError, r"layers\.0\.weight: No eigenvalue .* threshold 0\.02"),
    ],
)
def test_the_null_space_refuses(files, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moments_file(tmp_path, "npz")
    save_file({"D": torch.eye(6)}, "d.safetensors")
    save_file({"C": torch.eye(6)}, "full.safetensors")
    module = Model(adamw)
    before = weights(module)
    with pytest.raises(error, match=message):
        fit(module, NullSpace(files=files))
    assert_same(weights(module), before)
