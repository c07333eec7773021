"""Cells as processes: side by side, skipped, resumed, failing, stopped; and the table of what they measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

from rect_lightning.cli import main
from rect_lightning.experiments import Grid, collect, command, run_grid, running
from tests import tiny
from tests.editors.test_base import opinionated
from tests.test_cli import checkpoint, furnish, same_weights, settle

if sys.platform == "win32":
    pytest.skip("there is no SIGKILL", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
GRID = """
name: small
base: tiny.yaml
common:
  data: {batch_size: 1}
  trainer:
    callbacks:
      class_path: rect_lightning.callbacks.SideEffects
      init_args:
        every_n_edits: 2
        tasks: [{class_path: rect_lightning.tasks.Perplexity, init_args: {path: text.txt, context: 64, tokens: 600}}]
axes:
  regulariser:
    none:
    RECT 90: {trainer: {callbacks: {class_path: rect_lightning.callbacks.RECT, init_args: {keep: 0.9}}}}
  run:
    calm:
    killed: {trainer: {callbacks: {class_path: tests.experiments.test_running.KilledOnce}}}
"""


class KilledOnce(Callback):
    """Ends the process at its third operation, if it is the first to be run in this folder."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        flag = Path(trainer.log_dir) / "was_killed"
        if batch_idx == 2 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Real runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A grid of four, of which two are killed, and then run again: the folder, and what was there in between."""
    folder = tmp_path_factory.mktemp("grid")
    opinionated("llama").save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    furnish(folder, folder / "base")
    (folder / "small.yaml").write_text(GRID)
    command = ["experiment", "--config", "small.yaml", "--jobs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, patch)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as end:
            main(command)
        states = {cell.name: cell.state() for cell in Grid.load("small.yaml").cells()}
        between = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        table = rows("runs/small/table.csv")
        main(command)
    return folder / "runs" / "small", end.value.code, states, between, table


def test_failed_cells_are_told_and_stop_no_other(ran):
    _, message, states, _, table = ran
    assert states == {
        "none_calm": "done", "none_killed": "failed", "RECT-90_calm": "done", "RECT-90_killed": "failed",
    }  # fmt: skip
    assert message.startswith("2 cells failed")
    assert "none_killed, from runs/small/none_killed/cell.log:\n" in message
    assert {row["regulariser"] for row in table if row["run"] == "calm" and row["source"] == "after"} == {
        "none",
        "RECT 90",
    }
    assert {row["edits"] for row in table if row["run"] == "killed" and row["source"] == "change"} == {"1", "2"}


def test_what_is_done_is_left_alone(ran):
    _, _, _, before, _ = ran
    done = [path for path in before if path.parent.name in ("none_calm", "RECT-90_calm")]
    assert len(done) >= 18
    assert all(path.stat().st_mtime_ns == before[path] for path in done)


def test_a_killed_cell_goes_on(ran):
    folder = ran[0]
    for name in ("none", "RECT-90"):
        assert "--ckpt_path" not in (folder / f"{name}_killed" / "cell.yaml").read_text()
        assert (folder / f"{name}_killed" / "metrics.1.csv").is_file()
        first = [
            row["edit/requests"] for row in rows(folder / f"{name}_killed" / "metrics.csv") if row["edit/requests"]
        ]
        assert first == ["2.0", "3.0", "4.0"], "the first operation was in the checkpoint"
        assert same_weights(checkpoint(folder / f"{name}_calm"), checkpoint(folder / f"{name}_killed"))


def test_the_table_is_what_the_runs_files_say(ran):
    folder = ran[0]
    table = rows(folder / "table.csv")
    assert [*table[0]] == ["regulariser", "run", "edits", "source", "name", "value", "low", "high", "n", "unparseable"]
    for levels, name in ((("none", "calm"), "none_calm"), (("RECT 90", "killed"), "RECT-90_killed")):
        found = [row for row in table if (row["regulariser"], row["run"]) == levels]

        def of(source, found=found):
            return {(int(r["edits"]), r["name"]): float(r["value"]) for r in found if r["source"] == source}

        side = rows(folder / name / "side_effects.csv")
        assert {int(row["edits"]) for row in side} == {0, 2, 4}
        for source in ("task", "edits"):
            expected = [r for r in side if (r["task"] == "edits") == (source == "edits")]
            assert of(source) == {(int(r["edits"]), r["score"]): float(r["value"]) for r in expected}
            for row, there in zip((r for r in found if r["source"] == source), expected, strict=True):
                assert [row[key] for key in ("low", "high", "n")] == [there[key] for key in ("low", "high", "n")]
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert of("before") == {(0, key): value for key, value in metrics["before"].items()}
        assert of("after") == {(4, key): value for key, value in metrics["after"].items()}
        each = json.loads((folder / name / "requests.json").read_text())
        (locality,) = [r for r in found if (r["source"], r["name"]) == ("after", "locality/exact")]
        assert int(locality["n"]) == sum("locality/exact" in request["after"] for request in each) == 1
        logged = {}
        for log in (folder / name / "metrics.1.csv", folder / name / "metrics.csv"):
            for row in rows(log) if log.is_file() else []:
                if row["edit/requests"]:
                    logged[int(float(row["edit/requests"]))] = {k: float(v) for k, v in row.items() if v}
        assert [*logged] == [1, 2, 3, 4]
        assert of("change") == {
            (n, k.removeprefix("change/")): v
            for n, row in logged.items()
            for k, v in row.items()
            if k.startswith("change/")
        }
        assert len(of("change")) == 4 * 2 * 3, "four edits, two layers, three statistics"
        regulariser = {(n, k): v for n, row in logged.items() for k, v in row.items() if k.startswith("rect/")}
        assert of("regulariser") == regulariser
        assert bool(regulariser) == (levels[0] == "RECT 90")
        cost = of("cost")
        assert {n: cost[n, "seconds_per_edit"] for n in logged} == {n: row["edit/seconds"] for n, row in logged.items()}
        assert 5e7 < cost[4, "peak_memory/host"] < 5e9


def test_a_resumed_cell_has_the_rows_of_an_uninterrupted_one(ran):
    table = [row for row in rows(ran[0] / "table.csv") if row["source"] != "cost"]
    calm, killed = ([{**row, "run": ""} for row in table if row["run"] == run] for run in ("calm", "killed"))
    assert calm == killed


def test_list_and_collect(ran, monkeypatch, capsys):
    folder = ran[0]
    monkeypatch.chdir(folder.parents[1])
    before = (folder / "table.csv").read_text()
    (folder / "table.csv").unlink()
    (folder / "grid.yaml").unlink()
    main(["experiment", "--config", "small.yaml", "--list", "--only", "run=calm"])
    out = capsys.readouterr().out
    assert "2 cells, 2 done" in out
    assert "killed" not in out
    assert not (folder / "table.csv").exists()
    main(["experiment", "--config", "small.yaml", "--collect"])
    assert (folder / "table.csv").read_text() == before
    again = Grid.load(folder / "grid.yaml")
    assert again == Grid.load("small.yaml"), "bases are written out"
    assert [cell.state() for cell in again.cells()] == ["done"] * 4


# Scheduling, with processes that do nothing --------------------------------------------------------------------------

DONE = "echo '{}' > $CELL/cell.json"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "check", lambda cells: None)
    return Grid(
        name="g", axes={"a": {"x": {"data": {"limit": 1}}, "y": {}}, "b": {"1": {}, "2": {}}}, output=tmp_path / "out"
    )


def scripted(monkeypatch, script):
    monkeypatch.setattr(
        running, "_command", lambda cell: ["sh", "-c", f"CELL={cell.folder}; NAME={cell.name}; {script}"]
    )


def test_so_many_at_once_with_their_share_of_the_cores(grid, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(running, "_cores", lambda: 7)
    scripted(monkeypatch, f"echo $OMP_NUM_THREADS; echo 1 >> out/log; sleep 0.3; echo -1 >> out/log; {DONE}")
    assert run_grid(grid, jobs=2) == []
    assert {cell.log.read_text() for cell in grid.cells()} == {"3\n"}
    steps = [int(line) for line in (grid.output / "log").read_text().split()]
    assert len(steps) == 8
    assert max(sum(steps[: i + 1]) for i in range(8)) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for cell in grid.cells():
        (cell.folder / "cell.json").unlink()
    run_grid(grid, jobs=4)
    assert {cell.log.read_text() for cell in grid.cells()} == {"3\n5\n"}


def test_only_some(grid, monkeypatch):
    scripted(monkeypatch, DONE)
    run_grid(grid, only={"a": ["y"], "b": ["2"]})
    assert [cell.name for cell in grid.cells() if cell.state() == "done"] == ["y_b-2"]


def test_a_failed_cell_stops_no_other(grid, monkeypatch, caplog):
    scripted(monkeypatch, f"[ $NAME = x_b-2 ] && exit 3; {DONE}")
    with caplog.at_level("INFO"):
        assert [cell.name for cell in run_grid(grid)] == ["x_b-2"]
    assert [cell.state() for cell in grid.cells()] == ["done", "failed", "done", "done"]
    assert "2 of 4: x_b-2 FAILED, see " in caplog.text


def test_why_a_cell_failed_is_told_until_it_is_started_again(grid, monkeypatch, capsys):
    scripted(
        monkeypatch, f"[ $NAME = x_b-1 ] && kill -9 $$; [ $NAME = x_b-2 ] && echo 'OSError: [full]' && exit 1; {DONE}"
    )
    run_grid(grid)
    first, second = grid.cells()[:2]
    assert first.failure.read_text() == "killed by signal 9\n"
    command._show(grid.cells())
    assert "failed: OSError: [full]" in capsys.readouterr().out
    scripted(monkeypatch, f"[ -e $CELL/failed ] && exit 1; {DONE}")
    assert run_grid(grid, only={"b": ["2"]}) == []
    assert (first.state(), second.state()) == ("failed", "done")


def test_a_cell_that_another_command_has_by_now_is_not_called_failed(grid):
    cell = grid.cells()[0]
    cell.prepare()
    cell.log.write_text("OSError: full\n")
    with cell.lock().acquire(timeout=0):
        running._tell_failure(cell, 1)
    assert not cell.failure.exists()
    running._tell_failure(cell, 1)
    assert cell.failure.read_text() == "OSError: full\n"
    cell.log.unlink()
    running._tell_failure(cell, 1)


def test_a_broken_file_of_one_cell_takes_no_other_s_rows_away(grid, monkeypatch, caplog):
    scripted(monkeypatch, f"{DONE}; [ $NAME = x_b-2 ] && echo '{{' > $CELL/metrics.json || true")
    run_grid(grid)
    assert "x_b-2 is not in the table: " in caplog.text
    with (grid.output / "table.csv").open() as file:
        assert file.readline()


def test_the_table_is_collected_once_in_the_end(grid, monkeypatch):
    tables = []
    monkeypatch.setattr(running, "collect", tables.append)
    scripted(monkeypatch, DONE)
    run_grid(grid)
    assert tables == [grid]


def test_another_configuration_is_refused_or_made_anew(grid, monkeypatch):
    scripted(monkeypatch, DONE)
    run_grid(grid)
    other = Grid(name="g", axes={**grid.axes, "a": {"x": {"data": {"limit": 2}}, "y": {}}}, output=grid.output)
    assert [cell.state() for cell in other.cells()] == ["changed", "changed", "done", "done"]
    scripted(monkeypatch, f"touch $CELL/ran; {DONE}")
    with pytest.raises(ValueError, match="2 cells were made with another configuration, x_b-1 for one"):
        run_grid(other)
    assert not list(grid.output.glob("*/ran"))
    (grid.output / "x_b-1" / "old").touch()
    assert run_grid(other, rerun=True) == []
    assert sorted(path.parent.name for path in grid.output.glob("*/ran")) == ["x_b-1", "x_b-2"]
    assert not (grid.output / "x_b-1" / "old").exists()
    assert yaml.safe_load((grid.output / "x_b-1" / "cell.yaml").read_text())["data"] == {"limit": 2}
    assert {cell.state() for cell in other.cells()} == {"done"}


def test_cells_of_another_configuration_are_not_in_the_table(grid, monkeypatch):
    side = "edits,task,score,value,low,high,n,unparseable\\n0,sst2,sst2/option,0.5,,,3,\\n2,sst2,sst2/option,0."
    scripted(monkeypatch, f"printf '{side}' > $CELL/side_effects.csv; {DONE}")
    run_grid(grid)
    table = rows(grid.output / "table.csv")
    assert [(row["a"], row["b"], row["edits"]) for row in table] == [(a, b, "0") for a in "xy" for b in "12"]
    other = Grid(name="g", axes={**grid.axes, "a": {"x": {"data": {"limit": 2}}, "y": {}}}, output=grid.output)
    assert {row["a"] for row in rows(collect(other))} == {"y"}


SAVES = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGINT, save)
(folder / "ready").touch()
time.sleep(60)
"""


def test_ctrl_c_lets_the_processes_save(grid, monkeypatch):
    monkeypatch.setattr(running, "_command", lambda cell: [sys.executable, "-c", SAVES, str(cell.folder)])

    def impatient(seconds):
        time.sleep(seconds)
        if len(list(grid.output.glob("*/ready"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "sleep", impatient)
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, jobs=2)
    assert len(list(grid.output.glob("*/saved"))) == 2
    assert not (grid.output / "y_b-1").exists()
    assert (grid.output / "table.csv").is_file()
    assert [cell.state() for cell in grid.cells()[:2]] == ["begun"] * 2


def test_who_does_not_heed_ctrl_c_is_killed(grid, monkeypatch):
    scripted(monkeypatch, "trap '' INT; touch $CELL/ready; exec sleep 60")
    monkeypatch.setattr(running, "_GRACE", 0.2)

    def impatient(seconds):
        time.sleep(seconds)
        if list(grid.output.glob("*/ready")):
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "sleep", impatient)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid)
    assert time.monotonic() - start < 20


WORKER = """
import sys, time, types
from rect_lightning.experiments import worker
def run():
    open("ran", "a").write(sys.argv[3] + "\\n")
    time.sleep(0.3)
sys.modules["rect_lightning.cli"] = types.SimpleNamespace(run=run)
worker._checkpoint, worker._peak_memory = lambda folder: [], dict
worker.work(worker.Path(sys.argv[1]))
"""


def test_two_commands_share_the_cells(grid, monkeypatch):
    """Both end when all is done, and none is run twice."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(running, "_command", lambda cell: [sys.executable, "-c", WORKER, str(cell.folder)])
    states = []

    def command():
        failed = run_grid(grid, jobs=2)
        states.append((failed, [cell.state() for cell in grid.cells()]))

    threads = [threading.Thread(target=command) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [([], ["done"] * 4)] * 2
    assert sorted(Path("ran").read_text().split()) == [str(cell.folder / "cell.yaml") for cell in grid.cells()]


def test_a_cell_is_made_by_one_process_at_a_time(grid):
    cell = grid.cells()[0]
    cell.prepare()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with cell.lock():
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(cell.folder)], env=environment)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        assert not Path("ran").exists()
    assert process.wait(60) == 0
    assert Path("ran").exists()
