"""Run the cells of a grid, several at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from time import sleep

from filelock import Timeout

from rect_lightning.experiments.cell import Cell
from rect_lightning.experiments.checking import check
from rect_lightning.experiments.grid import Grid
from rect_lightning.experiments.table import collect

_log = logging.getLogger(__name__)

_GRACE = 60.0
"""Seconds in which a cell may save where it is, after Ctrl-C."""


def run_grid(
    grid: Grid, *, jobs: int = 1, only: Mapping[str, Collection[str]] | None = None, rerun: bool = False
) -> list[Cell]:
    """Run all cells that are not done, each in a process of its own, and collect the table in the end.

    One that was broken off goes on from its last checkpoint. A cell that another command is running is waited for.
    Each process gets its share of the cores as ``OMP_NUM_THREADS``, unless that is set.

    Args:
        grid: The grid.
        jobs: How many cells to run at once.
        only: Levels of axes to which to keep.
        rerun: Throw away, and make anew, cells that were made with another configuration.

    Returns:
        The cells that failed.

    Raises:
        ValueError: A configuration is wrong, or cells were made with another one; nothing was started.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}.")
    cells = [cell for cell in grid.cells(only) if cell.state() != "done"]
    check(cells)
    _refuse_changed(cells, rerun)
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // jobs)), **os.environ}
    queue, failed, ended = list(cells), list[Cell](), 0
    running: dict[subprocess.Popen[bytes], Cell] = {}
    start = time.monotonic()
    try:
        while queue or running:
            for cell in list(queue):
                if len(running) < jobs and _prepared(cell):
                    queue.remove(cell)
                    running[_start(cell, environment)] = cell
            for process in [process for process in running if process.poll() is not None]:
                cell, ended = running.pop(process), ended + 1
                if process.returncode:
                    failed.append(cell)
                    _tell_failure(cell, process.returncode)
                seconds = (time.monotonic() - start) / ended * (len(cells) - ended)
                _log.info(
                    "%d of %d: %s %s; about %s to go", ended, len(cells), cell.name,
                    f"FAILED, see {cell.log}" if process.returncode else "done", timedelta(seconds=round(seconds)),
                )  # fmt: skip
            sleep(0.1)
    finally:
        _stop(running)
        collect(grid)
    return failed


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_changed(cells: Iterable[Cell], rerun: bool) -> None:
    changed = [cell.name for cell in cells if cell.state() == "changed"]
    if changed and not rerun:
        raise ValueError(
            f"{len(changed)} cells were made with another configuration, {changed[0]} for one (its cell.yaml says which). Give "
            "--rerun to throw away what is there and make them anew, or another output to keep it."
        )


def _prepared(cell: Cell) -> bool:
    """Whether the cell can be started, its folder being ready; not while another process works at it."""
    try:
        with cell.lock().acquire(timeout=0):
            cell.prepare()
    except Timeout:
        return False
    return True


def _tell_failure(cell: Cell, status: int) -> None:
    """Leave the last line that the cell printed, which of an error says what it was; unless another command has it now."""
    with suppress(Timeout, FileNotFoundError), cell.lock().acquire(timeout=0):
        lines = cell.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        reason = f"killed by signal {-status}" if status < 0 else last or f"exit status {status}"
        cell.failure.write_text(f"{reason}\n", encoding="utf-8")


def _command(cell: Cell) -> list[str]:
    return [sys.executable, "-m", "rect_lightning.experiments.worker", str(cell.folder)]


def _start(cell: Cell, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with cell.log.open("ab") as log:
        # in a session of its own, so that Ctrl-C comes from here, once
        return subprocess.Popen(
            _command(cell), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Let processes save where they are, and end."""
    for process in processes:
        process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
    until = time.monotonic() + _GRACE
    try:
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
    finally:  # also after another Ctrl-C
        for process in processes:
            process.kill()
            process.wait()
