"""A run that is killed at any moment goes on where it was, and ends with the same weights to the bit."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback

from rect_lightning.callbacks import RECT
from rect_lightning.callbacks.running import RunningCheckpoint
from rect_lightning.checkpoint_io import read_checkpoint
from rect_lightning.runs import last_checkpoint
from tests.editors.test_base import facts, fit, identical, memit, state, trainer

if sys.platform == "win32":
    pytest.skip("there is no SIGKILL", allow_module_level=True)

# where the run is killed, and how many of its four operations are on the disk then
POINTS = {
    "within operation 3": 2,
    "after operation 3": 3,
    "checkpoint 3 half written": 2,
    "checkpoint 3 not in its place": 2,
    "checkpoint 3 in its place": 3,
}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, function, instead, counts=lambda *_: True):
    """A function which at one of the calls that count does something else."""
    calls = iter(range(1, number + 1))
    return lambda *args: (instead if counts(*args) and next(calls, 0) == number else function)(*args)


def of_a_checkpoint(_source, target):
    return str(target).endswith(".ckpt")


class Kills(Callback):
    def __init__(self, hook, number):
        setattr(self, hook, at_call(number, lambda *_: None, die))


def killed_run(folder, point):
    """The body of a process: a run that writes a checkpoint after each operation and is killed at some point."""
    os.environ["RECT_LIGHTNING_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    save, replace, callbacks = torch.save, os.replace, []

    def half(content, file):
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        die()

    if point == "within operation 3":
        callbacks = [Kills("on_before_optimizer_step", 6)]  # at its second layer
    elif point == "after operation 3":
        callbacks = [Kills("on_train_batch_start", 4)]
    elif point == "checkpoint 3 half written":
        torch.save = at_call(3, save, half)
    elif point == "checkpoint 3 not in its place":
        os.replace = at_call(3, replace, die, of_a_checkpoint)
    else:
        os.replace = at_call(3, replace, lambda *args: (replace(*args), die()), of_a_checkpoint)
    running = RunningCheckpoint(timedelta(0), str(folder / "runs" / "version_0" / "checkpoints"))
    fit(memit(folder), facts(folder), RECT(0.4), running, *callbacks, enable_checkpointing=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are killed: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processes():
    """Processes that are forked from one which has all imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.editors.test_kills"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of an uninterrupted run, and its moments."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECT_LIGHTNING_CACHE", str(folder / "cache"))
        torch.manual_seed(0)
        editor = memit(folder)
        fit(editor, facts(folder), RECT(0.4))
    return state(editor)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on(tmp_path, monkeypatch, processes, whole, point):
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    process = processes.Process(target=killed_run, args=(tmp_path, point))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    checkpoints = tmp_path / "runs" / "version_0" / "checkpoints"
    left = {path.name for path in checkpoints.iterdir()}
    unfinished = {"running.ckpt.partial"} if point.endswith(("written", "not in its place")) else set()
    assert left == {"running.ckpt"} | unfinished
    path = last_checkpoint([tmp_path / "runs"])
    assert len(read_checkpoint(path)["rect_lightning"]["requests"]) == POINTS[point]

    resumed = memit(tmp_path)
    again = RunningCheckpoint(timedelta(0), str(checkpoints))
    trainer(RECT(0.4), again).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert resumed.done == ["a", "b", "c", "d"]
    assert identical(state(resumed), whole)
    assert {file.name for file in checkpoints.iterdir()} == {"running.ckpt"}
