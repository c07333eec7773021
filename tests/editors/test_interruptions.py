"""What is left when something fails or stops in the middle, and that nothing of one run shows up in the next."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader

from rect_lightning.callbacks import RECT
from rect_lightning.callbacks.running import RunningCheckpoint
from rect_lightning.metrics import EditMetrics, evaluate
from rect_lightning.solving.values import ValueSearch
from tests import tiny
from tests.editors.test_base import (
    facts,
    fit,
    identical,
    memit,
    opinionated,
    requests,
    rome,
    state,
    trainer,
)


class FailsOnce(Callback):
    """Raises at the second layer of the third operation."""

    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        if self.steps == 6:
            raise RuntimeError("power cut")


class SavesInTheMiddle(Callback):
    """Saves a checkpoint between the two layers of the second operation, as a scheduler's signal may."""

    def __init__(self, path):
        self.path, self.steps = path, 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        if self.steps == 4:
            trainer.save_checkpoint(self.path)


def test_a_failed_operation_is_made_again_on_resume(tmp_path):
    whole, broken, resumed = (memit(tmp_path) for _ in range(3))
    fit(whole, facts(tmp_path), RECT(0.4))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, facts(tmp_path), RECT(0.4), FailsOnce(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    trainer(RECT(0.4)).fit(resumed, datamodule=facts(tmp_path), ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.done == ["a", "b", "c", "d"]
    assert identical(state(resumed), state(whole))


def test_a_checkpoint_in_the_middle_of_an_operation_holds_none_of_it(tmp_path):
    whole, resumed = memit(tmp_path), memit(tmp_path)
    fit(whole, facts(tmp_path), SavesInTheMiddle(tmp_path / "middle.ckpt"))
    first = memit(tmp_path)
    fit(first, facts(tmp_path, limit=1))
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert saved["rect_lightning"]["requests"] == ["a"]
    for name, weight in saved["state_dict"].items():
        assert torch.equal(weight, first.state_dict()[name]), name
    trainer().fit(resumed, datamodule=facts(tmp_path), ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.done == ["a", "b", "c", "d"]
    assert identical(state(resumed), state(whole))


@pytest.mark.parametrize(
    "options", [{"every_n_steps": 3}, {"scope": "run", "start_step": 6}, {"scope": "run", "start_step": 2}]
)
@pytest.mark.parametrize("stopped", ["failed", "saved in the middle"])
def test_a_regulariser_goes_on_as_if_nothing_had_been_tried(tmp_path, options, stopped):
    quick = ValueSearch(steps=3, lr=0.5, weight_decay=0.0, clamp=10.0, kl=0.0)
    whole, broken, resumed = (memit(tmp_path, search=quick) for _ in range(3))
    callback = RECT(0.4, **options)
    run = fit(whole, facts(tmp_path), callback)
    if stopped == "failed":
        path, interruption = tmp_path / "on_exception.ckpt", FailsOnce()
        with pytest.raises(RuntimeError, match="power cut"):
            fit(
                broken, facts(tmp_path), RECT(0.4, **options), interruption, OnExceptionCheckpoint(tmp_path),
                enable_checkpointing=True,
            )  # fmt: skip
    else:
        path = tmp_path / "middle.ckpt"
        fit(broken, facts(tmp_path), RECT(0.4, **options), SavesInTheMiddle(path))
    again = RECT(0.4, **options)
    second = trainer(again)
    second.fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert identical(state(resumed), state(whole))
    assert second.global_step == run.global_step == 8
    assert again.state_dict()["steps"] == callback.state_dict()["steps"] == [8]


@pytest.mark.parametrize("stopped", ["failed", "saved in the middle"])
def test_steps_of_an_operation_that_was_undone_do_not_count_towards_max_steps(tmp_path, stopped):
    whole, broken, resumed = (memit(tmp_path) for _ in range(3))
    fit(whole, facts(tmp_path), max_steps=7)
    if stopped == "failed":
        path = tmp_path / "on_exception.ckpt"
        with pytest.raises(RuntimeError, match="power cut"):
            fit(
                broken, facts(tmp_path), FailsOnce(), OnExceptionCheckpoint(tmp_path), max_steps=7,
                enable_checkpointing=True,
            )  # fmt: skip
    else:
        path = tmp_path / "middle.ckpt"
        fit(broken, facts(tmp_path), SavesInTheMiddle(path), max_steps=7)
    assert torch.load(path, weights_only=True)["global_step"] == (4 if stopped == "failed" else 2)
    trainer(max_steps=7).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert resumed.done == whole.done == ["a", "b", "c", "d"]


class SavesWhileClean(Callback):
    """Saves a checkpoint while the clean model is being measured, as a scheduler's signal may."""

    def __init__(self, path):
        self.path = path

    def on_validation_start(self, trainer, pl_module):
        with pl_module.clean_weights(), pl_module.clean_weights():
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_while_the_clean_weights_are_in_place_holds_the_edited_ones(tmp_path):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path), SavesWhileClean(tmp_path / "clean.ckpt"))
    saved = torch.load(tmp_path / "clean.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 2
    assert all(torch.equal(weight, editor.state_dict()[name]) for name, weight in saved.items())
    assert not editor.is_clean()


class SavesAfterEach(Callback):
    """Saves a checkpoint after each operation, and before each validation."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(self.folder / f"{pl_module.operations} after.ckpt")

    def on_validation_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{pl_module.operations} measured.ckpt")


@pytest.mark.parametrize("limit", [2, 1.0])
def test_an_epoch_begins_with_the_first_request_wherever_the_run_was_stopped(tmp_path, limit):
    quick = ValueSearch(steps=3, lr=0.5, weight_decay=0.0, clamp=10.0, kl=0.0)
    options = {"max_epochs": 2, "limit_train_batches": limit}
    whole = memit(tmp_path, search=quick)
    fit(whole, facts(tmp_path), SavesAfterEach(tmp_path), **options)
    assert whole.done == ["a", "b", "c", "d"][: 2 if limit == 2 else 4] * 2
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == len(whole.done) + 2
    for path in saved:
        resumed = memit(tmp_path, search=quick)
        trainer(**options).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
        assert resumed.done == whole.done, path
        assert identical(state(resumed), state(whole)), path


def test_a_whole_pass_is_not_gone_on_with_other_data(tmp_path):
    fit(memit(tmp_path), facts(tmp_path, limit=2), SavesAfterEach(tmp_path))
    with pytest.raises(ValueError, match=r"has edited a, b in 2 operations .* the data as configured begin with c"):
        trainer().fit(memit(tmp_path), datamodule=facts(tmp_path, offset=2), ckpt_path=tmp_path / "2 measured.ckpt")


def test_single_mode_puts_the_clean_weights_back_when_measuring_fails(tmp_path, monkeypatch):
    editor = rome(tmp_path, mode="single")
    monkeypatch.setattr("rect_lightning.editors.scored.Scored.now", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(editor, facts(tmp_path))
    assert editor.is_clean()


def test_single_mode_leaves_the_trainer_its_checkpoint_callback(tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path)
    run = fit(rome(tmp_path, mode="single"), facts(tmp_path), callback)
    assert callback in run.callbacks
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(("mode", "options"), [("single", {}), ("sequential", {"fast_dev_run": 1})])
@pytest.mark.parametrize("when", ["prepare", "begin"])
def test_a_failed_fit_leaves_the_trainer_its_checkpoint_callbacks(tmp_path, monkeypatch, mode, options, when):
    editor = rome(tmp_path, mode=mode)
    monkeypatch.setattr(editor, when, lambda *_: 1 / 0)
    run = trainer(ModelCheckpoint(dirpath=tmp_path / "saved"), RunningCheckpoint(), **options)
    before = list(run.callbacks)
    with pytest.raises(ZeroDivisionError):
        run.fit(editor, datamodule=facts(tmp_path))
    assert run.callbacks == before
    assert not list(tmp_path.rglob("*.ckpt"))


def test_two_fits_in_single_mode_are_measured_apart(tmp_path):
    editor = rome(tmp_path, mode="single")
    fit(editor, facts(tmp_path, limit=1))
    first = editor.results
    fit(editor, facts(tmp_path, limit=1))
    assert editor.results == first
    assert int(editor.measurement.after.count.max()) == 1


def test_another_model_is_edited_with_its_own_moments(tmp_path):
    other = opinionated("llama", seed=5)
    editor, fresh = memit(tmp_path), memit(tmp_path, model=opinionated("llama", seed=5))
    fit(editor, facts(tmp_path))
    editor.attach(other, tiny.tokenizer())
    assert editor.operations == 0
    fit(editor, facts(tmp_path))
    fit(fresh, facts(tmp_path))
    assert identical(state(editor), state(fresh))


def test_metrics_are_in_full_precision_whatever_the_search_is(tmp_path):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path), precision="bf16-mixed")
    by_hand = EditMetrics()
    data = facts(tmp_path)
    data.prepare_data()
    data.setup()
    by_hand.update(evaluate(editor.model, data.requests))
    for name, value in by_hand.compute().items():
        assert editor.results["after"][name] == float(value), name


def test_any_loader_of_requests_will_do(tmp_path):
    editor = memit(tmp_path)
    trainer().fit(editor, DataLoader(requests(), batch_size=2, collate_fn=list))
    assert editor.done == ["a", "b", "c", "d"]


def test_a_neighbour_that_does_not_fit_the_model_is_refused_before_anything_is_edited(tmp_path):
    editor, data = memit(tmp_path), facts(tmp_path)
    data.prepare_data()
    data.setup()
    long = "so " * 200
    data._requests[0] = type(data.requests[0])(
        id="long", subject="Spain", prompt="{} is", target_new="so", paraphrases=(long,)
    )
    with pytest.raises(ValueError, match="context is 128"):
        fit(editor, data)
    assert editor.operations == 0
    assert editor.is_clean()
