"""What a grid of editors says: how well each edits, what that costs the model, its time; and where long runs collapse.

    python -m rect_lightning experiment --config comparison_smollm2.yaml
    python -m benchmarks.comparison runs/comparison_smollm2 --by requests protocol --out comparison.md
    python -m benchmarks.comparison runs/long_runs_smollm2

One table for each combination of levels of the axes in --by, a row a cell. Editing metrics are of all requests in the end, and
in the first row those of the clean model, where it is asked the same in all cells.
"abilities" and "perplexity, ratio" are of the last point at which tasks were measured: the mean over the tasks of the main
score as a share of the one at 0 edits, without perplexity and tasks of which the clean model can do nothing; and perplexity
over that at 0 edits, or after over before all edits where it was no task. "s an edit" is the mean over all edits. "peak of the
run, GB" is that of the whole process, loading, moments and measuring included, and the first run of a grid makes what the
others find in the cache.

Where edits were measured more than once along the way, more tables follow: efficacy and exact efficacy over all edits so far
and the ratio of perplexity, by the number of edits; and the number of edits at which a run was first seen collapsed, with
perplexity doubled or efficacy below one half (from the first point on: it never took), and the seconds an edit in the first and
the last tenth of the operations. A model that is nothing but noise still prefers the new target to the old one half of the
time, so exact efficacy tells more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks.claims import PERPLEXITY, shares_left
from benchmarks.output import write
from rect_lightning.reports.reading import read_grid
from rect_lightning.reports.results import Results, Row, lower_is_better, mean_over_edits

METRICS = {
    "efficacy": "efficacy/probability",
    "exact": "efficacy/exact",
    "free": "efficacy/wild",
    "generalisation": "generalisation/probability",
    "gen. exact": "generalisation/exact",
    "gen. free": "generalisation/wild",
    "locality": "locality/probability",
    "unchanged": "locality/unchanged",
}
"""Columns, and the metrics of the edits that stand in them."""
ABILITIES, SECONDS, MEMORY = "abilities", "s an edit", "peak of the run, GB"
SUMMARY = (*METRICS, ABILITIES, PERPLEXITY, SECONDS, MEMORY)
EFFICACIES = ("efficacy", "exact")
DOUBLED, HALF = 2.0, 0.5
"""The ratio of perplexity and the efficacy at which a run counts as collapsed."""

Rows = Sequence[Row]
Told = dict[str, str]


def summary(rows: Rows) -> Told:
    """The columns of one cell, those of `SUMMARY` that were measured."""
    found = _edit_metrics(rows, "after")
    if left := [[*shares.values()][-1] for name, shares in shares_left(rows).items() if not lower_is_better(name)]:
        found[ABILITIES] = f"{fmean(left):.2f}"
    if ratios := perplexity_ratios(rows):
        found[PERPLEXITY] = _ratio(ratios[max(ratios)])
    if operations := _operations(rows):
        found[SECONDS] = f"{mean_over_edits(operations):.3g}"
    if memory := [row.value for row in rows if row.source == "cost" and row.name == "peak_memory/host"]:
        found[MEMORY] = f"{max(memory) / 1e9:.2f}"
    return found


def _edit_metrics(rows: Rows, source: str) -> Told:
    values = {row.name: row.value for row in rows if row.source == source}
    return {column: f"{values[name]:.3f}" for column, name in METRICS.items() if name in values}


def perplexity_ratios(rows: Rows) -> dict[int, float]:
    """Perplexity over that of the clean model, by the number of edits; before and after where no task measured it."""
    for name, ratios in shares_left(rows).items():
        if lower_is_better(name):
            return ratios
    before = {row.name: row.value for row in rows if row.source == "before" and lower_is_better(row.name)}
    after = [row for row in rows if row.source == "after" and before.get(row.name)]
    return {row.edits or 0: row.value / before[row.name] for row in after[:1]}


def efficacies(rows: Rows, column: str) -> dict[int, float]:
    """Efficacy over all edits so far, as a column of the summary has it, by their number; of no edit there is none."""
    found = {row.edits or 0: row.value for row in rows if row.source == "edits" and row.name == METRICS[column]}
    return {edits: value for edits, value in sorted(found.items()) if edits}


def collapse(rows: Rows) -> Told:
    """Where a run was first seen collapsed, of what was measured, and whether its edits became slower.

    What is no number counts as collapsed.
    """
    found: Told = {}
    if ratios := perplexity_ratios(rows):
        found["perplexity doubled at"] = _first(ratios, lambda ratio: ratio < DOUBLED)
    for column in EFFICACIES:
        if values := efficacies(rows, column):
            found[f"{column} below one half at"] = _first(values, lambda value: value >= HALF)
    if operations := _operations(rows):
        tenth = max(1, len(operations) // 10)
        found[f"{SECONDS}, first tenth"] = f"{mean_over_edits(operations[:tenth]):.3g}"
        found[f"{SECONDS}, last tenth"] = f"{mean_over_edits(operations[-tenth:]):.3g}"
    return found


def _operations(rows: Rows) -> list[Row]:
    """Seconds an edit of each operation in turn."""
    cost = [row for row in rows if row.source == "cost" and row.name == "seconds_per_edit"]
    return sorted(cost, key=lambda row: row.edits or 0)


def _first(values: Mapping[int, float], sound: Callable[[float], bool]) -> str:
    return next((str(edits) for edits, value in sorted(values.items()) if not sound(value)), "never")


def _ratio(value: float) -> str:
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def tables(results: Results, by: Sequence[str]) -> list[str]:
    """The lines of all tables, and how many cells are left out since they are not done.

    Raises:
        ValueError: The grid has no such axis.
    """
    if unknown := [axis for axis in by if axis not in results.axes]:
        raise ValueError(f"There is no axis {unknown[0]}; there are {', '.join(results.axes)}.")
    inner = [i for i, axis in enumerate(results.axes) if axis not in by]
    groups: dict[tuple[str, ...], dict[str, Rows]] = {}
    for cell in results.cells:
        levels = tuple(cell[results.axes.index(axis)] for axis in by)
        name = ", ".join(cell[i] for i in inner)
        groups.setdefault(levels, {})[name] = [row for row in results.rows if row.cell == cell]
    lines: list[str] = []
    for levels, cells in groups.items():
        if levels:
            lines += [f"**{', '.join(f'{axis}: {level}' for axis, level in zip(by, levels, strict=True))}**", ""]
        found = {name: summary(rows) for name, rows in cells.items()}
        clean = [_edit_metrics(rows, "before") for rows in cells.values()]
        if all(clean) and all(told == clean[0] for told in clean):
            found = {"before": clean[0], **found}
        columns = [column for column in SUMMARY if any(column in told for told in found.values())]
        lines += [*_table("", columns, found), ""]
        if any(len(efficacies(rows, column)) > 1 for rows in cells.values() for column in EFFICACIES):
            lines += _along(cells)
    if results.left_out:
        lines += [f"{results.left_out} cells are not done and left out.", ""]
    return lines


def _along(cells: Mapping[str, Rows]) -> list[str]:
    """Tables of what became of the runs as edits were made."""
    lines: list[str] = []
    for what, curves, told in (
        *(
            (f"{column} over all edits so far", partial(efficacies, column=column), "{:.3f}".format)
            for column in EFFICACIES
        ),
        (PERPLEXITY, perplexity_ratios, _ratio),
    ):
        found = {name: {str(n): told(value) for n, value in curves(rows).items()} for name, rows in cells.items()}
        if columns := sorted({n for values in found.values() for n in values}, key=int):
            lines += [*_table(what, columns, found), ""]
    ends = {name: collapse(rows) for name, rows in cells.items()}
    return [*lines, *_table("", list(dict.fromkeys(name for told in ends.values() for name in told)), ends), ""]


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Told]) -> list[str]:
    lines = [
        [corner, *columns],
        *([name, *(told.get(column, "") for column in columns)] for name, told in rows.items()),
    ]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return [head, "|---" * (len(columns) + 1) + "|", *body]


def main(arguments: list[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a grid's folder")
    parser.add_argument("--by", nargs="*", default=[], help="axes whose combinations have a table each")
    parser.add_argument("--out", type=Path, help="file for the tables; printed if not given")
    args = parser.parse_args(arguments)
    write("\n".join(tables(read_grid(args.folder), args.by)), args.out)


if __name__ == "__main__":
    main()
