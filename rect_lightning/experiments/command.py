"""The command ``experiment``."""

from __future__ import annotations

import logging
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from rect_lightning.experiments.cell import Cell
from rect_lightning.experiments.grid import Grid

_log = logging.getLogger(__name__)

_DESCRIPTION = """Run a grid of fits, every combination of the levels of its axes, and collect all they measure.

Each cell is a process and a folder of its own. What is done is left alone, what was broken off goes on."""


def experiment(args: Sequence[str]) -> None:
    """Run the command line of ``experiment``.

    Raises:
        SystemExit: A cell failed, or Ctrl-C was pressed.
    """
    parser = ArgumentParser(
        "rect_lightning experiment", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-c", "--config", action="append", required=True, metavar="NAME.yaml",
        help="a grid: a file, one that comes with the package, or YAML written out; more are laid over the first",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each with its share of the cores")
    parser.add_argument(
        "--only", action="append", default=[], metavar="AXIS=LEVEL",
        help="only this level of an axis; may be given several times",
    )  # fmt: skip
    parser.add_argument("--rerun", action="store_true", help="make cells anew whose configuration has changed")
    parser.add_argument("--list", "--dry_run", action="store_true", help="show the cells and what has become of them")
    parser.add_argument("--collect", action="store_true", help="only write table.csv")
    options = parser.parse_args(args)

    grid, only = Grid.load(*options.config), _only(options.only)
    if options.list:
        _show(grid.cells(only))
        return
    from rect_lightning.experiments import collect, run_grid

    _stop_as_by_ctrl_c()
    try:
        failed = [] if options.collect else run_grid(grid, jobs=options.jobs, only=only, rerun=options.rerun)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on.")
    _log.info("The table: %s", collect(grid) if options.collect else grid.output / "table.csv")
    if failed:
        tails = [f"{cell.name}, from {cell.log}:\n{_tail(cell)}" for cell in failed]
        sys.exit("\n\n".join([f"{len(failed)} cells failed:", *tails]))


def _stop_as_by_ctrl_c() -> None:
    """Let signals that end a process stop its cells first, unless they are ignored, as under nohup."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _only(words: Sequence[str]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for word in words:
        axis, equals, level = word.partition("=")
        if not equals:
            raise ValueError(f"--only takes AXIS=LEVEL, and got {word!r}.")
        chosen.setdefault(axis, []).append(level)
    return chosen


def _show(cells: Sequence[Cell]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*cells[0].levels, "state") if cells else Table()
    states = [cell.state() for cell in cells]
    for cell, state in zip(cells, states, strict=True):
        why = f": {cell.failure.read_text(encoding='utf-8').strip()}" if state == "failed" else ""
        table.add_row(*cell.levels.values(), escape(state + why))
    console = Console()
    console.print(table)
    console.print(f"{len(cells)} cells, {states.count('done')} done")


def _tail(cell: Cell, lines: int = 8) -> str:
    text = cell.log.read_text(encoding="utf-8", errors="replace")
    return "\n".join("  " + line for line in text.splitlines()[-lines:])
