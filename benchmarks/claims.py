"""What a grid of experiments says of regularisers: how much of the edits and of the abilities each keeps.

    python -m rect_lightning experiment --config paper_small_gpt2.yaml
    python -m benchmarks.claims runs/paper_small_gpt2 --out claims.md

One table for each combination of the other axes. Values are means over the seeds with 95 % t intervals, for the ratio of
perplexities from and to, both taken of the logarithm; n is told where it is not that of all seeds. What is compared with
"none" is compared seed by seed, on the same records. The abilities are the main scores of the tasks, each as the share of
what it was at 0 edits; a curve is the mean over all points measured after 0 edits, an end the last point. Shares of none's
efficacy and generalisation are those of the curves, where edits were measured along the way. Where edits pile up, a second
table says how far the edited weights had come from the clean ones in the end: the shares of entries whose relative change is
above the paper's two thresholds, and the sum of the absolute changes, as means over layers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.output import write
from rect_lightning.reports.intervals import mean_and_interval
from rect_lightning.reports.reading import read_grid
from rect_lightning.reports.results import SEED, Results, Row, lower_is_better

REGULARISER, NONE, PERPLEXITY = "regulariser", "none", "perplexity, ratio"
EDITING = ("efficacy/exact", "generalisation/exact", "locality/unchanged")
KEPT = EDITING[:2]

Cell = tuple[str, ...]
Values = dict[str, float]


def measured(folder: Path) -> tuple[tuple[str, ...], dict[Cell, list[Row]]]:
    """The axes of a grid, and the rows of each cell that is done.

    Raises:
        ValueError: No cell is done, or there is no axis of regularisers or of seeds.
    """
    results = read_grid(folder)
    if not {REGULARISER, SEED} <= {*results.axes}:
        raise ValueError(f"{folder} has the axes {', '.join(results.axes)}; {REGULARISER} and {SEED} are compared.")
    return results.axes, {cell: [row for row in results.rows if row.cell == cell] for cell in results.cells}


def summary(rows: Sequence[Row]) -> Values:
    """The editing metrics of one cell in the end, and what is left of its abilities."""
    found = {row.name: row.value for row in rows if row.source == "after" and row.name in EDITING}
    for name in KEPT:
        if along := [row.value for row in rows if row.source == "edits" and row.name == name]:
            found[_curve(name)] = fmean(along)
    left = shares_left(rows)
    if abilities := [[*left[name].values()] for name in left if not lower_is_better(name)]:
        found |= {
            "abilities, end": fmean(shares[-1] for shares in abilities),
            "abilities, curve": fmean(fmean(shares) for shares in abilities),
        }
    for name in filter(lower_is_better, left):
        found[PERPLEXITY] = [*left[name].values()][-1]
    return found


def changed(rows: Sequence[Row]) -> Values:
    """How far the weights of one cell are from the clean ones in the end; nothing where edits do not pile up."""
    if not any(row.source == "edits" for row in rows):
        return {}
    last = {row.name: row.value for row in sorted(rows, key=lambda row: row.edits or 0) if row.source == "change"}
    layers: dict[str, list[float]] = defaultdict(list)
    for name, value in last.items():
        layers[name.partition("/")[2]].append(value)
    return {name: fmean(values) for name, values in layers.items()}


def _curve(name: str) -> str:
    return f"{name}, curve"


def shares_left(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Of each task's main score what is left after 0 edits, as a share of the one at 0 edits, by the number of edits.

    Scores that are zero at 0 edits are left out.
    """
    found = {}
    results = Results(title="", rows=tuple(rows))
    for name in results.main_scores:
        values = {row.edits or 0: row.value for row in sorted(results.of("task", name), key=lambda row: row.edits or 0)}
        if (clean := values.pop(0, 0.0)) and values:
            found[name] = {edits: value / clean for edits, value in values.items()}
    return found


def tables(axes: Sequence[str], cells: Mapping[Cell, Sequence[Row]]) -> list[str]:
    """The lines of all tables."""
    regulariser, seed = axes.index(REGULARISER), axes.index(SEED)
    groups: dict[Cell, dict[str, dict[str, Sequence[Row]]]] = defaultdict(lambda: defaultdict(dict))
    for cell, rows in cells.items():
        others = tuple(level for i, level in enumerate(cell) if i not in (regulariser, seed))
        groups[others][cell[regulariser]][cell[seed]] = rows
    most = len({cell[seed] for cell in cells})
    lines: list[str] = []
    for others, methods in groups.items():
        lines += [f"**{', '.join(others)}**", ""]
        lines += [*_table(methods, summary, most, compared=True), ""]
        if change := _table(methods, changed, most):
            lines += [f"**{', '.join(others)}: how the weights had changed in the end**", "", *change, ""]
    return lines


def _table(
    methods: Mapping[str, Mapping[str, Sequence[Row]]],
    summarised: Callable[[Sequence[Row]], Values],
    most: int,
    *,
    compared: bool = False,
) -> list[str]:
    """The lines of one table, a row a method; none where there is nothing to tell."""
    found = {method: {s: summarised(rows) for s, rows in seeds.items()} for method, seeds in methods.items()}
    names = list(dict.fromkeys(name for seeds in found.values() for values in seeds.values() for name in values))
    if not names:
        return []
    header = ["", *names, *(["of none's efficacy", "of its generalisation", "curve less none's"] if compared else [])]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    none = found.get(NONE, {})
    for method, seeds in found.items():
        columns = [
            ([values[name] for values in seeds.values() if name in values], name == PERPLEXITY) for name in names
        ]
        if compared:
            columns += [(_kept(seeds, none, name), False) for name in KEPT]
            columns.append((_above(seeds, none), False))
        cells = [_mean(values, ratio=ratio, of=most) for values, ratio in columns]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return lines


def _kept(seeds: Mapping[str, Values], none: Mapping[str, Values], name: str) -> list[float]:
    """A metric as a share of that of "none", seed by seed; its mean along the way, if that was measured."""
    if any(_curve(name) in values for values in none.values()):
        name = _curve(name)
    pairs = [(seeds[s][name], none[s][name]) for s in seeds if s in none and name in seeds[s] and none[s].get(name)]
    return [a / b for a, b in pairs]


def _above(seeds: Mapping[str, Values], none: Mapping[str, Values]) -> list[float]:
    """How far the abilities' curve lies above that of "none", seed by seed."""
    name = "abilities, curve"
    return [seeds[s][name] - none[s][name] for s in seeds if s in none and name in seeds[s] and name in none[s]]


def _mean(values: Sequence[float], *, ratio: bool, of: int) -> str:
    if not values:
        return ""
    mean, low, high = mean_and_interval(values, ratio=ratio)
    places = 3 if abs(mean) < 1000 else 0
    told = f"{mean:.{places}f}"
    if low is not None and high is not None:
        told += f" ({low:.3g} to {high:.3g})" if ratio else f" ± {(high - low) / 2:.{places}f}"
    return told if len(values) == of else f"{told}, n = {len(values)}"


def main(arguments: list[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a grid's folder")
    parser.add_argument("--out", type=Path, help="file for the tables; printed if not given")
    args = parser.parse_args(arguments)
    text = "\n".join(tables(*measured(args.folder)))
    write(text, args.out)


if __name__ == "__main__":
    main()
