"""All that a grid has measured, in one tidy table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rect_lightning.durable import whole_file
from rect_lightning.experiments.cell import lock_of
from rect_lightning.experiments.grid import COLUMNS, Grid

Row = dict[str, Any]


def collect(grid: Grid) -> Path:
    """Write ``table.csv``: a row a measurement, of all cells that have begun with their present configuration.

    Returns:
        The table.
    """
    table = grid.output / "table.csv"
    with lock_of(table), whole_file(table) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*grid.axes, *COLUMNS))
        writer.writeheader()
        for cell in grid.cells():
            if cell.state() in ("begun", "done"):
                writer.writerows({**cell.levels, **row} for row in measurements(cell.folder))
    return table


def measurements(folder: Path) -> Iterator[Row]:
    """The rows of one run folder, without the axes."""
    for row in _read(folder / "side_effects.csv"):
        task, score = row.pop("task"), row.pop("score")
        yield {**row, "source": "edits" if task == "edits" else "task", "name": score}
    edits = 0
    for edits, row in sorted(_operations(folder).items()):
        yield from _operation(edits, row)
    yield from _before_and_after(folder)
    if (cell := folder / "cell.json").is_file():
        for name, value in json.loads(cell.read_text(encoding="utf-8")).items():
            yield {"edits": edits, "source": "cost", "name": name, "value": value}


def _before_and_after(folder: Path) -> Iterator[Row]:
    from rect_lightning.callbacks.summary import requests_of

    files = [folder / f"{name}.json" for name in ("metrics", "requests", "provenance")]
    if not all(path.is_file() for path in files):
        return
    results, each, provenance = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    counts = requests_of(each)
    for source, edits in (("before", 0), ("after", len(provenance["requests"]))):
        for name, value in results[source].items():
            yield {"edits": edits, "source": source, "name": name, "value": value, "n": counts.get(name)}


def _operations(folder: Path) -> dict[int, Row]:
    """What was logged at each operation, by the number of edits then, which a resumed run may have made again."""
    logs = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.suffixes[0][1:]))
    found: dict[int, Row] = {}
    before = 0
    for path in (*logs, folder / "metrics.csv"):
        for row in _read(path):
            if row.get("edit/requests"):
                edits = int(float(row["edit/requests"]))
                found[edits] = row
    for edits, row in sorted(found.items()):
        row["made"] = edits - before
        before = edits
    return found


def _operation(edits: int, row: Row) -> Iterator[Row]:
    made = row.pop("made")
    yield {
        "edits": edits, "source": "cost", "name": "seconds_per_edit", "value": float(row["edit/seconds"]) / made, "n": made,
    }  # fmt: skip
    for name, value in row.items():
        kind, _, rest = name.partition("/")
        if value and kind == "change":
            yield {"edits": edits, "source": "change", "name": rest, "value": value}
        elif value and rest and kind not in ("edit", "side", "before", "after"):
            yield {"edits": edits, "source": "regulariser", "name": name, "value": value}


def _read(path: Path) -> list[Row]:
    """The rows of a table that may be missing, or lack the end of its last line."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
