"""What a grid of experiments says of regularisers: how much of the edits and of the abilities each keeps.

    python -m rect_lightning experiment --config paper_small_gpt2.yaml
    python -m benchmarks.claims runs/paper_small_gpt2 --out claims.md

One table for each combination of the other axes. Values are means over the seeds with 95 % t intervals; what is compared with
"none" is compared seed by seed, on the same records. The abilities are the main scores of the tasks, each as the share of
what it was at 0 edits; their curve is its mean over all points measured after 0 edits, their end the last point.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rect_lightning.experiments.grid import COLUMNS
from rect_lightning.reports.intervals import t_interval
from rect_lightning.reports.results import SEED, Results, Row, lower_is_better

REGULARISER, NONE = "regulariser", "none"
EDITING = ("efficacy/exact", "generalisation/exact", "locality/unchanged")

Cell = tuple[str, ...]
Values = dict[str, float]


def measured(table: Path) -> tuple[list[str], dict[Cell, list[Row]]]:
    """The axes of a grid's table, and the rows of each cell.

    Raises:
        ValueError: There is no axis of regularisers or of seeds.
    """
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    axes = [name for name in lines[0] if name not in COLUMNS]
    if not {REGULARISER, SEED} <= {*axes}:
        raise ValueError(f"{table} has the axes {', '.join(axes)}; {REGULARISER} and {SEED} are compared.")
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for line in lines:
        row = Row(edits=int(line["edits"]), source=line["source"], name=line["name"], value=float(line["value"]))
        cells[tuple(line[axis] for axis in axes)].append(row)
    return axes, cells


def summary(rows: Sequence[Row]) -> Values:
    """The editing metrics of one cell in the end, and what is left of its abilities."""
    found = {row.name: row.value for row in rows if row.source == "after" and row.name in EDITING}
    results = Results(title="", rows=tuple(rows))
    shares = [
        _shares([row for row in rows if row.source == "task" and row.name == name]) for name in results.main_scores
    ]
    abilities = [
        share for name, share in zip(results.main_scores, shares, strict=True) if share and not lower_is_better(name)
    ]
    if abilities:
        found |= {
            "abilities, end": fmean(s[-1] for s in abilities),
            "abilities, curve": fmean(fmean(s) for s in abilities),
        }
    for name, share in zip(results.main_scores, shares, strict=True):
        if share and lower_is_better(name):
            found["perplexity, ratio"] = share[-1]
    return found


def _shares(rows: Sequence[Row]) -> list[float]:
    """A score after 0 edits, as shares of the one at 0 edits; nothing where that is zero."""
    rows = sorted(rows, key=lambda row: row.edits or 0)
    clean = rows[0].value if rows and rows[0].edits == 0 else 0.0
    return [row.value / clean for row in rows[1:]] if clean else []


def tables(axes: Sequence[str], cells: Mapping[Cell, Sequence[Row]]) -> list[str]:
    """The lines of all tables."""
    regulariser, seed = axes.index(REGULARISER), axes.index(SEED)
    groups: dict[Cell, dict[str, dict[str, Values]]] = defaultdict(lambda: defaultdict(dict))
    for cell, rows in cells.items():
        others = tuple(level for i, level in enumerate(cell) if i not in (regulariser, seed))
        groups[others][cell[regulariser]][cell[seed]] = summary(rows)
    lines: list[str] = []
    for others, methods in groups.items():
        names = list(dict.fromkeys(name for seeds in methods.values() for values in seeds.values() for name in values))
        lines += [f"**{', '.join(others)}**", ""]
        lines.append(
            "| " + " | ".join(["", *names, "of none's efficacy", "of its generalisation", "curve less none's"]) + " |"
        )
        lines.append("|---" * (len(names) + 4) + "|")
        for method, seeds in methods.items():
            cells_ = [_mean([values[name] for values in seeds.values() if name in values]) for name in names]
            cells_ += [_kept(seeds, methods.get(NONE, {}), name) for name in EDITING[:2]]
            cells_.append(_above(seeds, methods.get(NONE, {})))
            lines.append("| " + " | ".join([method, *cells_]) + " |")
        lines.append("")
    return lines


def _kept(seeds: Mapping[str, Values], none: Mapping[str, Values], name: str) -> str:
    """A metric as a share of that of "none", seed by seed."""
    pairs = [(seeds[s][name], none[s][name]) for s in seeds if s in none and name in seeds[s] and none[s].get(name)]
    return _mean([a / b for a, b in pairs])


def _above(seeds: Mapping[str, Values], none: Mapping[str, Values]) -> str:
    """How far the abilities' curve lies above that of "none", seed by seed."""
    name = "abilities, curve"
    return _mean([seeds[s][name] - none[s][name] for s in seeds if s in none and name in seeds[s] and name in none[s]])


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    low, high = t_interval(values)
    return f"{fmean(values):.3f} ± {(high - low) / 2:.3f}"


def main(arguments: list[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a grid's folder")
    parser.add_argument("--out", type=Path, help="file for the tables; printed if not given")
    args = parser.parse_args(arguments)
    text = "\n".join(tables(*measured(args.folder / "table.csv")))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
