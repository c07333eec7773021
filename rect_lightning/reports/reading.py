"""Reading the folder of a run or of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rect_lightning.callbacks.summary import describe
from rect_lightning.experiments.grid import COLUMNS
from rect_lightning.experiments.table import measurements, read_csv, read_json
from rect_lightning.reports.results import Results, Row, mean_over_seeds, with_abilities_kept


def read(path: Path) -> Results:
    """The results of a run folder or of a grid's folder, averaged over seeds.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is of another kind, holds no value, or a file in it is broken.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}: name a run folder, or a grid's folder with a table.csv.")
    if (path / "table.csv").is_file():
        results = read_grid(path)
    elif (path / "config.yaml").is_file() or (path / "metrics.json").is_file():
        results = _run(path)
    else:
        raise ValueError(
            f"{path} is neither a run folder, which has a config.yaml, nor a grid's folder, which has a table.csv."
        )
    return mean_over_seeds(with_abilities_kept(results))


def read_grid(path: Path) -> Results:
    """The results of all cells of a grid that are done, which have measured what they came to.

    Raises:
        FileNotFoundError: There is no table in this folder, or no folder.
        ValueError: The table is broken, or no cell in it is done.
    """
    file = path / "table.csv"
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}: name the folder of a grid that has been run.")
    lines = read_csv(file, COLUMNS)
    axes = tuple(list(lines[0])[: -len(COLUMNS)]) if lines else ()
    found = (_row(f"{file}, line {number}", line, axes) for number, line in enumerate(lines, 2))
    begun = Results(
        title=path.resolve().name,
        subtitle="; ".join(f"{axis}: {', '.join(dict.fromkeys(line[axis] for line in lines))}" for axis in axes),
        axes=axes,
        rows=tuple(row for row in found if row is not None),
        configuration=_texts(path, sorted(other.name for other in path.glob("*.yaml"))),
        provenance=_texts(path, ["provenance.json"]),
    )
    done = {row.cell for row in begun.of("after")}
    if not done:
        raise ValueError(
            f"{file} has nothing to report: no cell in it is done, {len(begun.cells)} are under way or have failed. Run the "
            "grid to its end, or collect its table anew."
        )
    rows = tuple(row for row in begun.rows if row.cell in done)
    return replace(begun, rows=rows, left_out=len(begun.cells) - len(done))


def _run(path: Path) -> Results:
    told = read_json(path / "provenance.json", {})
    edits = len(told["requests"]) if "requests" in told else None
    config = told.get("config", {})
    regularisers = config.get("regularisers", [])
    names = [regulariser["callback"].rpartition(".")[2] for regulariser in regularisers]
    keep = [options["keep"] for name, options in zip(names, regularisers, strict=True) if name == "RECT"]
    title = path.name
    if {"editor", "mode", "operations"} <= told.keys() and edits is not None:
        title = describe(edits, told["operations"], told.get("method", told["editor"]), told["mode"], names)
    rows = (_row(f"{path}, {line['source']} {line['name']}", line) for line in measurements(path))
    results = Results(
        title=title,
        subtitle=_of_model(told),
        rows=tuple(row for row in rows if row is not None),
        changes=read_json(path / "relative_change.json", {}),
        keep=keep[0] if keep else None,
        samples=tuple(read_json(path / "samples.json", [])),
        configuration=_texts(path, ["config.yaml"]),
        provenance=_texts(path, ["provenance.json"]),
    )
    if not results.rows:
        raise ValueError(f"{path} has nothing to report: no value is in its files. Was the run broken off at once?")
    return results


def _of_model(told: dict[str, Any]) -> str:
    layers = told.get("layers", [])
    name = told.get("base", {}).get("name", "")
    numbers = ", ".join(map(str, layers))
    return f"{name}, layer{'s' * (len(layers) != 1)} {numbers}" if name and layers else name


def _row(where: str, line: Mapping[str, Any], axes: Sequence[str] = ()) -> Row | None:
    """A line of a table; none where it has no value."""
    edits, value, low, high, n, unparseable = (
        _number(where, line, column) for column in ("edits", "value", "low", "high", "n", "unparseable")
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


def _number(where: str, line: Mapping[str, Any], column: str) -> float | None:
    given = line.get(column)
    if given is None or given == "":
        return None
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"{where}: {column} should be a number and is {given!r}.") from error


def _texts(path: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: (path / name).read_text(encoding="utf-8") for name in names if (path / name).is_file()}
