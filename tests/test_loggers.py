"""Run folders that runs do not share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from rect_lightning import loggers as module
from rect_lightning.loggers import RunFolder


def test_runs_that_start_together_have_a_folder_each(tmp_path):
    loggers = [RunFolder(tmp_path, name=None) for _ in range(8)]
    start = threading.Barrier(len(loggers))

    def ask(logger):
        start.wait()
        _ = logger.version

    threads = [threading.Thread(target=ask, args=(logger,)) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {logger.version for logger in loggers} == set(range(8))
    assert {path.name for path in tmp_path.iterdir()} == {f"version_{n}" for n in range(8)}


def test_another_run_may_come_between(tmp_path, monkeypatch):
    answers = iter([0, 0, 1])
    monkeypatch.setattr(RunFolder, "_get_next_version", lambda self: next(answers))
    assert [RunFolder(tmp_path, name=None).version for _ in range(2)] == [0, 1]


def test_a_version_that_is_named_may_exist(tmp_path):
    for _ in range(2):
        logger = RunFolder(tmp_path, name=None, version=0)
        logger.log_metrics({"a": 1.0})
        logger.save()
    assert (tmp_path / "version_0" / "metrics.csv").read_text().splitlines() == ["a,step", "1.0,0"]


def test_a_folder_that_stays_empty_goes(tmp_path):
    script = (
        "from rect_lightning.loggers import RunFolder; import sys; print(RunFolder(sys.argv[1], name=None).version)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, check=True
        )
        assert run.stdout.strip() == b"0"
        assert not list(tmp_path.iterdir())
