"""UltraEdit's update against the paper's formula, written out in float64, and what it remembers."""

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from rect_lightning.callbacks import RECT
from rect_lightning.editors import UltraEdit
from rect_lightning.models import Source
from rect_lightning.models.encoding import encode
from tests import tiny
from tests.editors.test_base import (
    FAMILIES,
    Failing,
    facts,
    fit,
    identical,
    opinionated,
    record_updates,
    requests,
    state,
    trainer,
)
from tests.editors.test_fine_tuning import facts as long_facts
from tests.editors.test_interruptions import FailsOnce, SavesInTheMiddle
from tests.editors.test_memit import relative
from tests.solving.test_token_gradients import naive


def ultraedit(family="llama", *, model=None, **options):
    editor = UltraEdit(base=Source(name="tiny"), **({"layers": [1, 2], "lr": 1e-3, "prose": None} | options))
    editor.attach(opinionated(family) if model is None else model, tiny.tokenizer())
    return editor


def keys_and_gradients(editor, batch):
    """``[layers, tokens, ...]`` of requests, one at a time through the whole model in float64."""
    rows = encode(editor.model.tokenizer, [r.text for r in batch], [r.target_new for r in batch])
    found = [naive(editor.model, row, editor.layers)[:2] for row in rows]
    return (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


EPSILON = torch.finfo(torch.float32).eps  # the published one; the gradients of a tiny model are hardly larger


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_layer_s_update_is_the_paper_s(tmp_path, monkeypatch, family):
    editor = ultraedit(model=tiny.model(family))
    updates = record_updates(editor, monkeypatch)
    fit(editor, long_facts(tmp_path, batch_size=2), limit_val_batches=0)
    editor.restore()
    seen = {1: [], 2: []}
    assert [layer for layer, *_ in updates] == [1, 2, 1, 2]
    for start in (0, 2):
        keys, gradients = keys_and_gradients(editor, updates[start][2])
        for (layer, update, *_), h, g in zip(updates[start : start + 2], keys, gradients, strict=True):
            seen[layer].append(torch.cat([h, g], dim=1))
            every = torch.cat(seen[layer])
            h_hat, g_hat = ((seen[layer][-1] - every.mean(0)) / (every.std(0) + EPSILON)).split(
                [h.shape[1], g.shape[1]], dim=1
            )
            v = -1e-3 * (h_hat**2).sum(1, keepdim=True) * g_hat
            expected = torch.linalg.inv(h.T @ h + torch.eye(h.shape[1]).double()) @ h.T @ v
            assert relative(update.T, expected) < 1e-4
            torch.testing.assert_close(
                (h.T @ h) @ update.T + update.T, h.T @ v, rtol=1e-4, atol=1e-4 * float(v.abs().max())
            )
        for layer, update, *_ in updates[start : start + 2]:
            editor.model.weight(layer).data += editor.model.oriented(layer, update).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_an_edit_makes_the_targets_likelier(tmp_path, family, step_per):
    editor = ultraedit(family, step_per=step_per, lr=3e-3)
    fit(editor, facts(tmp_path, batch_size=4), RECT(0.8))
    before, after = editor.results["before"], editor.results["after"]
    assert after["efficacy/magnitude"] > before["efficacy/magnitude"] + 0.01


def test_layer_and_operation_are_the_same_without_a_regulariser(tmp_path):
    """All layers come from one pass."""
    weights = []
    for step_per in ("layer", "operation"):
        editor = ultraedit(step_per=step_per)
        fit(editor, facts(tmp_path, batch_size=2), limit_val_batches=0)
        weights.append(state(editor))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_the_statistics_are_those_of_all_tokens_at_once(tmp_path):
    """With hardly any change to the weights, what comes in several operations is what comes in one."""
    memories = []
    for batch_size in (2, 4):
        editor = ultraedit(lr=1e-12)
        fit(editor, facts(tmp_path, batch_size=batch_size), limit_val_batches=0)
        memories.append(editor.memory)
    assert memories[0].keys() == {f"{name}.{layer}" for name in ("count", "mean", "squares") for layer in (1, 2)}
    keys, gradients = keys_and_gradients(editor, requests())
    for layer, h, g in zip((1, 2), keys, gradients, strict=True):
        rows = torch.cat([h, g], dim=1)
        for memory in memories:
            assert memory[f"count.{layer}"] == len(rows)
            torch.testing.assert_close(memory[f"mean.{layer}"], rows.mean(0), rtol=1e-3, atol=1e-6)
            variance = memory[f"squares.{layer}"] / (len(rows) - 1)
            torch.testing.assert_close(variance, rows.var(0), rtol=1e-3, atol=1e-9)


def test_single_mode_has_statistics_of_its_own_operation_alone(tmp_path, monkeypatch):
    editor, alone = ultraedit(mode="single"), ultraedit()
    updates, expected = record_updates(editor, monkeypatch), record_updates(alone, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=2))
    assert editor.memory == {}
    data, path = facts(tmp_path, batch_size=2), tmp_path / "facts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    fit(alone, data, limit_val_batches=0)
    assert relative(updates[-1][1], expected[-1][1]) < 1e-5


def test_a_single_token_is_refused(tmp_path):
    editor = ultraedit()
    with pytest.raises(ValueError, match=r"a single token so far: edit several .*, by data\.batch_size"):
        fit(editor, facts(tmp_path, batch_size=1))
    assert editor.is_clean()
    assert editor.memory == {}


def test_operations_of_one_request_are_refused_in_single_mode(tmp_path):
    for size in (1, 3):  # and one of the four is left over
        editor = ultraedit(mode="single")
        with pytest.raises(ValueError, match=r"here of a single request: set data\.batch_size above 1"):
            fit(editor, facts(tmp_path, batch_size=size))
        assert editor.is_clean()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failed_operation_leaves_nothing_in_the_statistics(tmp_path, monkeypatch, layer):
    editor, once = ultraedit(), ultraedit()
    Failing(editor, monkeypatch, float("nan"), operation=1, layer=layer)
    with pytest.raises(RuntimeError, match="not finite"):
        fit(editor, facts(tmp_path, batch_size=2))
    fit(once, facts(tmp_path, batch_size=2), limit_train_batches=1, limit_val_batches=0)
    assert identical(editor.memory, once.memory)
    assert identical(state(editor), state(once))


@pytest.mark.parametrize("stopped", ["failed", "saved in the middle"])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path, stopped):
    whole, broken, resumed = ultraedit(), ultraedit(), ultraedit()
    long = facts(tmp_path, batch_size=2)
    text = (tmp_path / "facts.jsonl").read_text()
    (tmp_path / "facts.jsonl").write_text(text + text.replace('"id": "', '"id": "again '))
    fit(whole, long, RECT(0.4))
    if stopped == "failed":
        path = tmp_path / "on_exception.ckpt"
        with pytest.raises(RuntimeError, match="power cut"):
            fit(broken, long, RECT(0.4), FailsOnce(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    else:
        path = tmp_path / "middle.ckpt"
        fit(broken, long, RECT(0.4), SavesInTheMiddle(path))
    trainer(RECT(0.4)).fit(resumed, datamodule=long, ckpt_path=path)
    assert len(resumed.done) == 8
    assert identical(state(resumed), state(whole))
    assert identical(resumed.memory, whole.memory)


@pytest.mark.parametrize("lr", [0.0, -1e-6, float("nan")])
def test_refuses_a_learning_rate_that_is_not_positive(lr):
    with pytest.raises(ValueError, match="lr must be positive"):
        UltraEdit(base=Source(name="tiny"), layers=[1], lr=lr)
