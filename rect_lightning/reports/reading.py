"""Reading the folder of a run or of a grid."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rect_lightning.callbacks.summary import describe, requests_of
from rect_lightning.reports.results import Results, Row, mean_over_seeds, with_abilities_kept

VALUES = ("edits", "source", "name", "value", "low", "high", "n", "unparseable")
"""The columns of a grid's table after those of its axes."""


def read(path: Path) -> Results:
    """The results of a run folder or of a grid's folder, averaged over seeds.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is of another kind, holds no value, or a file in it is broken.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}: name a run folder, or a grid's folder with a table.csv.")
    if (path / "table.csv").is_file():
        results = _grid(path)
    elif (path / "config.yaml").is_file() or (path / "metrics.json").is_file():
        results = _run(path)
    else:
        raise ValueError(
            f"{path} is neither a run folder, which has a config.yaml, nor a grid's folder, which has a table.csv."
        )
    if not results.rows:
        raise ValueError(f"{path} has nothing to report: no value is in its files. Was the run broken off at once?")
    return mean_over_seeds(with_abilities_kept(results))


# A run ---------------------------------------------------------------------------------------------------------------


def _run(path: Path) -> Results:
    told = _json(path / "provenance.json", {})
    edits = len(told["requests"]) if "requests" in told else None
    config = told.get("config", {})
    regularisers = config.get("regularisers", [])
    names = [regulariser["callback"].rpartition(".")[2] for regulariser in regularisers]
    keep = [options["keep"] for name, options in zip(names, regularisers, strict=True) if name == "RECT"]
    title = path.name
    if {"editor", "mode", "operations"} <= told.keys() and edits is not None:
        title = describe(edits, told["operations"], told["editor"], told["mode"], names)
    return Results(
        title=title,
        subtitle=_of_model(told),
        rows=(*_metrics(path, edits), *_side_effects(path), *_changes(path)),
        changes=_json(path / "relative_change.json", {}),
        keep=keep[0] if keep else None,
        piles_up=told.get("mode") != "single",
        samples=tuple(_json(path / "samples.json", [])),
        configuration=_texts(path, ["config.yaml"]),
        provenance=_texts(path, ["provenance.json"]),
    )


def _of_model(told: dict[str, Any]) -> str:
    layers = told.get("layers", [])
    name = told.get("base", {}).get("name", "")
    numbers = ", ".join(map(str, layers))
    return f"{name}, layer{'s' * (len(layers) != 1)} {numbers}" if name and layers else name


def _metrics(path: Path, edits: int | None) -> list[Row]:
    results = _json(path / "metrics.json", {})
    requests: Counter[str] = requests_of(_json(path / "requests.json", []))
    return [
        Row(edits=edits if when == "after" else 0, source=when, name=name, value=float(value), n=requests.get(name))
        for when, values in results.items()
        for name, value in values.items()
    ]


def _side_effects(path: Path) -> list[Row]:
    if not (path / "side_effects.csv").is_file():
        return []
    file = path / "side_effects.csv"
    lines = _csv(file, ("edits", "task", "score", "value", "low", "high", "n", "unparseable"))
    named = (
        {**line, "source": "edits" if line["task"] == "edits" else "task", "name": line["score"]} for line in lines
    )
    return [row for number, line in enumerate(named, 2) if (row := _row(file, number, line, ())) is not None]


def _changes(path: Path) -> list[Row]:
    """What `metrics.csv` says of each weight's change since the clean model, after each operation."""
    file = path / "metrics.csv"
    if not file.is_file():
        return []
    return [
        Row(edits=round(_number(file, number, line, "edit/requests") or 0), source="change", name=key[7:], value=value)
        for number, line in enumerate(_csv(file, ()), 2)
        for key in line
        if re.fullmatch(r"change/\d+/.+", key) and (value := _number(file, number, line, key)) is not None
    ]


# A grid --------------------------------------------------------------------------------------------------------------


def _grid(path: Path) -> Results:
    file = path / "table.csv"
    lines = _csv(file, VALUES)
    axes = tuple(list(lines[0])[: -len(VALUES)]) if lines else ()
    rows = (_row(file, number, line, axes) for number, line in enumerate(lines, 2))
    others = sorted(other.name for other in path.glob("*.yaml"))
    return Results(
        title=path.resolve().name,
        subtitle="; ".join(f"{axis}: {', '.join(dict.fromkeys(line[axis] for line in lines))}" for axis in axes),
        axes=axes,
        rows=tuple(row for row in rows if row is not None),
        configuration=_texts(path, others),
        provenance=_texts(path, ["provenance.json"]),
    )


# Files ---------------------------------------------------------------------------------------------------------------


def _row(file: Path, number: int, line: dict[str, str], axes: Sequence[str]) -> Row | None:
    """A line of a table; none where it has no value."""
    edits, value, low, high, n, unparseable = (
        _number(file, number, line, column) for column in ("edits", "value", "low", "high", "n", "unparseable")
    )
    if value is None:
        return None
    return Row(
        cell=tuple(line[axis] for axis in axes),
        edits=None if edits is None else round(edits),
        source=line["source"],
        name=line["name"],
        value=value,
        low=low,
        high=high,
        n=None if n is None else round(n),
        unparseable=unparseable,
    )


def _number(file: Path, number: int, line: dict[str, str], column: str) -> float | None:
    text = line.get(column) or ""
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {column} should be a number and is {text!r}.") from error


def _csv(file: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a table, whose last columns have to be the wanted ones."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened, restval="")
            columns, lines = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table of comma-separated values ({error}).") from error
    if tuple(columns[-len(wanted) :] if wanted else ()) != tuple(wanted):
        raise ValueError(f"{file}: the last columns should be {', '.join(wanted)}, and all are {', '.join(columns)}.")
    broken = next((number for number, line in enumerate(lines, 2) if None in line), None)
    if broken is not None:
        raise ValueError(f"{file}, line {broken}: it has more fields than there are columns.")
    return lines


def _json(file: Path, missing: Any) -> Any:
    if not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is broken: {error}. Measure the run again, or remove the file.") from error


def _texts(path: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: (path / name).read_text(encoding="utf-8") for name in names if (path / name).is_file()}
