"""What the Trainer's own options do to an edit."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rect_lightning.callbacks import RECT
from tests.editors.test_base import facts, fit, identical, memit, rome, state


def test_16_mixed_on_a_cpu_is_bf16_mixed_and_says_so(tmp_path):
    asked, bf16 = memit(tmp_path), memit(tmp_path)
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU. Using `precision='bf16-mixed'` instead"):
        fit(asked, facts(tmp_path, batch_size=2), precision="16-mixed")
    fit(bf16, facts(tmp_path, batch_size=2), precision="bf16-mixed")
    assert identical(state(asked), state(bf16))
    assert asked.results["after"]["efficacy/exact"] == 1


@pytest.mark.parametrize(("limit", "done"), [(1, ["a", "b"]), (0.5, ["a", "b"]), (1.0, ["a", "b", "c", "d"])])
def test_limit_train_batches_counts_operations(tmp_path, limit, done):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path, batch_size=2), limit_train_batches=limit)
    assert editor.done == done
    assert editor.results["after"]["efficacy/exact"] == 1


@pytest.mark.parametrize(
    ("step_per", "max_steps", "operations"), [("layer", 3, 2), ("layer", 2, 1), ("operation", 3, 3)]
)
def test_max_steps_ends_a_fit_after_a_whole_operation(tmp_path, caplog, step_per, max_steps, operations):
    editor, whole = memit(tmp_path, step_per=step_per), memit(tmp_path, step_per=step_per)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(editor, facts(tmp_path), max_steps=max_steps, max_epochs=-1)
    assert f"the fit ends with operation {operations} at the latest, which is made whole" in caplog.text
    fit(whole, facts(tmp_path, limit=operations))
    assert editor.done == ["a", "b", "c", "d"][:operations]
    assert identical(state(editor), state(whole))
    assert editor.results == whole.results
    assert editor.results["after"]


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_a_fast_dev_run_of_two_makes_two_operations(tmp_path, mode):
    editor = memit(tmp_path, mode=mode)
    fit(editor, facts(tmp_path), fast_dev_run=2)
    assert editor.done == ["a", "b"]
    assert editor.results["after"]["efficacy/exact"] == 1


def test_checkpoints_every_few_steps_are_of_whole_operations(tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(memit(tmp_path), facts(tmp_path), RECT(0.4), callback)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={2 * n}.ckpt" for n in (1, 2, 3, 4)}
    for n in (1, 2, 3, 4):
        saved = torch.load(tmp_path / f"step={2 * n}.ckpt", weights_only=True)
        assert saved["rect_lightning"]["requests"] == ["a", "b", "c", "d"][:n]
        short = memit(tmp_path)
        fit(short, facts(tmp_path, limit=n), RECT(0.4), limit_val_batches=0)
        assert all(torch.equal(weight, short.state_dict()[name]) for name, weight in saved["state_dict"].items())


def test_the_number_of_steps_between_checkpoints_is_met_at_an_operation_s_end(tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(memit(tmp_path), facts(tmp_path), callback)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=6.ckpt"], "two layers an operation"


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"max_steps": 1}, {"check_val_every_n_epoch": 2}])
def test_single_mode_reports_without_validation(tmp_path, options):
    editor = rome(tmp_path, mode="single")
    run = fit(editor, facts(tmp_path), **options)
    assert editor.results["before"]["efficacy/exact"] == 0
    assert editor.results["after"]["efficacy/exact"] == 1
    assert float(run.callback_metrics["after/efficacy/exact"]) == 1
    assert editor.is_clean()


def test_single_mode_restores_after_the_metrics_and_says_so(tmp_path, caplog):
    class Order(Callback):
        def __init__(self):
            self.seen = []

    editor, order = memit(tmp_path, mode="single"), Order()
    before = state(editor)
    add, restore = type(editor.measurement).add, editor.restore
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(type(editor.measurement), "add", lambda *args: (order.seen.append("metrics"), add(*args)))
        patch.setattr(editor, "restore", lambda: (order.seen.append("restored"), restore()))
        fit(editor, facts(tmp_path, batch_size=2))
    assert order.seen == ["metrics", "restored"] * 2
    assert identical(before, state(editor))
    assert "Single mode: the clean weights come back after each operation" in caplog.text


@pytest.mark.parametrize(("mode", "message"), [("sequential", "no weight differs"), ("single", "no edit operation")])
def test_a_fit_without_an_edit_is_an_error(tmp_path, mode, message):
    with pytest.raises(RuntimeError, match=message):
        fit(memit(tmp_path, mode=mode), facts(tmp_path), limit_train_batches=0)
