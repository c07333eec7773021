"""What a grid of editors says: how well each edits, what that costs the model, time and memory; where long runs collapse.

    python -m rect_lightning experiment --config comparison_smollm2.yaml
    python -m benchmarks.comparison runs/comparison_smollm2 --by requests protocol --out comparison.md
    python -m benchmarks.comparison runs/long_runs_smollm2

One table for each combination of levels of the axes in --by, a row a cell. Editing metrics are of all requests in the end,
abilities and perplexity what is left of them then: the mean over the tasks of the main score as a share of the one at 0
edits, and a ratio. Where edits were measured more than once along the way, two more tables follow. One has efficacy over
all edits so far and the ratio of perplexity after each number of edits. The other has the number of edits at which a run
was first seen collapsed, with perplexity doubled or efficacy below one half, and the seconds an edit in the first and the
last tenth of the operations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.claims import PERPLEXITY, shares_left
from rect_lightning.reports.reading import read_grid
from rect_lightning.reports.results import Results, Row, lower_is_better

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
ABILITIES, SECONDS, MEMORY = "abilities", "s an edit", "memory, GB"
DOUBLED, HALF = 2.0, 0.5
"""The ratio of perplexity and the efficacy at which a run counts as collapsed."""

Values = dict[str, float]
Rows = Sequence[Row]


def summary(rows: Rows) -> Values:
    """The columns of one cell."""
    after = {row.name: row.value for row in rows if row.source == "after"}
    found = {column: after[name] for column, name in METRICS.items() if name in after}
    if left := [[*shares.values()][-1] for name, shares in shares_left(rows).items() if not lower_is_better(name)]:
        found[ABILITIES] = fmean(left)
    if ratios := perplexity_ratios(rows):
        found[PERPLEXITY] = ratios[max(ratios)]
    if seconds := seconds_per_edit(rows):
        found[SECONDS] = fmean(seconds)
    if memory := [row.value for row in rows if row.source == "cost" and row.name == "peak_memory/host"]:
        found[MEMORY] = max(memory) / 1e9
    return found


def perplexity_ratios(rows: Rows) -> dict[int, float]:
    """Perplexity over that of the clean model, by the number of edits; before and after where no task measured it."""
    for name, ratios in shares_left(rows).items():
        if lower_is_better(name):
            return ratios
    before = [row.value for row in rows if row.source == "before" and lower_is_better(row.name)]
    after = [row for row in rows if row.source == "after" and lower_is_better(row.name)]
    return {row.edits or 0: row.value / clean for clean, row in zip(before, after, strict=True)}


def efficacies(rows: Rows) -> dict[int, float]:
    """Efficacy over all edits so far, by their number."""
    return {
        row.edits: row.value
        for row in rows
        if row.source == "edits" and row.name == METRICS["efficacy"] and row.edits  # of no edit there is none
    }


def seconds_per_edit(rows: Rows) -> list[float]:
    """Of each operation in turn."""
    cost = [row for row in rows if row.source == "cost" and row.name == "seconds_per_edit"]
    return [row.value for row in sorted(cost, key=lambda row: row.edits or 0)]


def collapse(rows: Rows) -> Values:
    """Where a run was first seen collapsed, and whether its edits became slower.

    A run that never collapsed has no such column.
    """
    perplexity = [edits for edits, ratio in sorted(perplexity_ratios(rows).items()) if ratio >= DOUBLED]
    efficacy = [edits for edits, value in sorted(efficacies(rows).items()) if value < HALF]
    found: Values = {}
    if perplexity:
        found["perplexity doubled at"] = perplexity[0]
    if efficacy:
        found["efficacy below one half at"] = efficacy[0]
    if seconds := seconds_per_edit(rows):
        tenth = max(1, len(seconds) // 10)
        found["s an edit, first tenth"] = fmean(seconds[:tenth])
        found["s an edit, last tenth"] = fmean(seconds[-tenth:])
    return found


def along(rows: Rows) -> Values:
    """Efficacy over all edits so far and the ratio of perplexity, after each number of edits."""
    found = {f"efficacy, {edits}": value for edits, value in sorted(efficacies(rows).items())}
    return found | {f"perplexity, {edits}": value for edits, value in sorted(perplexity_ratios(rows).items())}


def tables(results: Results, by: Sequence[str]) -> list[str]:
    """The lines of all tables.

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
        lines += [*_table(cells, summary), ""]
        if any(len(efficacies(rows)) > 1 for rows in cells.values()):
            lines += [*_table(cells, along), "", *_table(cells, collapse), ""]
    return lines


def _table(cells: Mapping[str, Rows], summarised: Callable[[Rows], Values]) -> list[str]:
    found = {name: summarised(rows) for name, rows in cells.items()}
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in found.items():
        lines.append("| " + " | ".join([name, *(_told(column, values.get(column)) for column in columns)]) + " |")
    return lines


def _told(column: str, value: float | None) -> str:
    if value is None:
        return "never" if column.endswith(" at") else ""
    if column.endswith(" at"):
        return f"{value:.0f}"
    if value >= 10 or column == SECONDS or column.startswith("s an edit"):
        return f"{value:.3g}"
    return (
        f"{value:.2f}"
        if column in (ABILITIES, PERPLEXITY, MEMORY) or column.startswith("perplexity")
        else f"{value:.3f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a grid's folder")
    parser.add_argument("--by", nargs="*", default=[], help="axes whose combinations have a table each")
    parser.add_argument("--out", type=Path, help="file for the tables; printed if not given")
    args = parser.parse_args(arguments)
    text = "\n".join(tables(read_grid(args.folder), args.by))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
