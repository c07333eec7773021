"""All that runs have measured, as tidy rows: those of one run folder, and those of a grid in one table."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rect_lightning.durable import whole_file
from rect_lightning.experiments.cell import lock_of
from rect_lightning.experiments.grid import COLUMNS, Grid

_log = logging.getLogger(__name__)

Row = dict[str, Any]

_SIDE_EFFECTS = ("edits", "task", "score", "value", "low", "high", "n", "unparseable")


def collect(grid: Grid) -> Path:
    """Write ``table.csv``: a row a measurement, of all cells that have begun with their present configuration.

    Beside it ``grid.yaml`` says what the grid is.

    Returns:
        The table.
    """
    table = grid.output / "table.csv"
    with lock_of(table):
        with whole_file(grid.output / "grid.yaml") as path:
            path.write_text(grid.text(), encoding="utf-8")
        with whole_file(table) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*grid.axes, *COLUMNS))
            writer.writeheader()
            for cell in grid.cells():
                if cell.state() not in ("begun", "failed", "done"):
                    continue
                try:
                    rows = list(measurements(cell.folder))
                except ValueError as error:  # of one cell, which takes no other's rows away
                    _log.warning("%s is not in the table: %s", cell.name, error)
                else:
                    writer.writerows({**cell.levels, **row} for row in rows)
    return table


def measurements(folder: Path) -> Iterator[Row]:
    """The rows of one run folder, without the axes; of a run that was broken off, as far as it came.

    Raises:
        ValueError: A file is broken.
    """
    for row in read_csv(folder / "side_effects.csv", _SIDE_EFFECTS):
        task, score = row.pop("task"), row.pop("score")
        yield {**row, "source": "edits" if task == "edits" else "task", "name": score}
    provenance = read_json(folder / "provenance.json", {})
    edits: int | None = None
    for edits, row in sorted(_operations(folder).items()):
        yield from _operation(edits, row, change="alone" if provenance.get("mode") == "single" else "change")
    yield from _before_and_after(folder, len(provenance["requests"]) if "requests" in provenance else edits)
    for name, value in read_json(folder / "cell.json", {}).items():
        yield {"edits": edits, "source": "cost", "name": name, "value": value}


def _before_and_after(folder: Path, edits: int | None) -> Iterator[Row]:
    from rect_lightning.callbacks.summary import requests_of

    counts = requests_of(read_json(folder / "requests.json", []))
    for source, values in read_json(folder / "metrics.json", {}).items():
        for name, value in values.items():
            at = 0 if source == "before" else edits
            yield {"edits": at, "source": source, "name": name, "value": value, "n": counts.get(name)}


def _operations(folder: Path) -> dict[int, Row]:
    """What was logged at each operation, by the number of edits then, which a resumed run may have made again."""
    logs = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.suffixes[0][1:]))
    found: dict[int, Row] = {}
    row: Row
    before = 0
    for path in (*logs, folder / "metrics.csv"):
        for row in read_csv(path):
            if row.get("edit/requests"):
                edits = int(float(row["edit/requests"]))
                found[edits] = row
    for edits, row in sorted(found.items()):
        row["made"] = edits - before
        before = edits
    return found


def _operation(edits: int, row: Row, *, change: str) -> Iterator[Row]:
    made = row.pop("made")
    if seconds := row.get("edit/seconds"):
        yield {
            "edits": edits, "source": "cost", "name": "seconds_per_edit", "value": float(seconds) / made, "n": made,
        }  # fmt: skip
    for name, value in row.items():
        kind, _, rest = name.partition("/")
        if value and kind == "change":
            yield {"edits": edits, "source": change, "name": rest, "value": value}
        elif value and rest and kind not in ("edit", "side", "before", "after"):
            yield {"edits": edits, "source": "regulariser", "name": name, "value": value}


# Files ---------------------------------------------------------------------------------------------------------------


def read_csv(file: Path, last: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a table that may be missing, or lack the end of its last line.

    Args:
        file: The table.
        last: What its last columns have to be.

    Raises:
        ValueError: It is no such table.
    """
    if not file.is_file():
        return []
    try:
        text = file.read_bytes().decode("utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), restval="")
        columns, lines = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table of comma-separated values ({error}).") from error
    if columns and last and columns[-len(last) :] != list(last):
        raise ValueError(f"{file}: the last columns should be {', '.join(last)}, and all are {', '.join(columns)}.")
    if broken := next((number for number, line in enumerate(lines, 2) if None in line), None):
        raise ValueError(f"{file}, line {broken}: it has more fields than there are columns.")
    return lines


def read_json(file: Path, missing: Any) -> Any:
    """The content of a file, or what stands for it where it is missing.

    Raises:
        ValueError: It is broken.
    """
    if not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is broken: {error}. Measure the run again, or remove the file.") from error
