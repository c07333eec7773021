"""Read records as they are, from a file or from the hub, each with the place where it stands."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rect_lightning.data.request import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".json", ".jsonl", ".csv")


def read_records(
    path: str | Path, *, split: str | None = None, name: str | None = None
) -> list[tuple[str, int, dict[str, Any]]]:
    """Read the records of a .json, .jsonl or .csv file, or of a data set on the hub, as they are.

    Returns:
        For each record where it stands, for messages, the number of its line or of the record, and the record.

    Raises:
        RequestError: If the file is broken or empty, naming file and line, or the hub does not give it.
        FileNotFoundError: If the file is not there.
        ValueError: If split or name are given with a file.
    """
    if _is_hub_name(path):
        unit = "record"
        numbered = list(enumerate(_hub_dataset(str(path), name=name, split=split), 1))
    else:
        if split is not None or name is not None:
            raise ValueError(f"split and name are for hub data sets, but {path} is a file; set them to null")
        unit = "line"
        numbered = [(row["line"], json.loads(row["record"])) for row in _file_dataset(Path(path).expanduser())]
    if not numbered:
        raise RequestError("no records; is it the right file?", where=str(path))
    return [(f"{path}, {unit} {number}", number, row) for number, row in numbered]


def missing_file(path: Path) -> FileNotFoundError:
    """The error for a file that is not there, with the near names in its folder."""
    if not path.parent.is_dir():
        return FileNotFoundError(f"{path} is not there, and neither is its folder")
    near = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.iterdir()), cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "no file in its folder has a similar name"
    return FileNotFoundError(f"{path} is not there; {hint}")


def _is_hub_name(path: str | Path) -> bool:
    """Whether a path is to be asked of the hub: it is written like ``name`` or ``owner/name`` and no file or folder."""
    file = Path(path).expanduser()
    return (
        isinstance(path, str)
        and not file.exists()
        and file.suffix.lower() not in _SUFFIXES
        and re.fullmatch(r"[\w-]+(/[\w.-]+)?", path) is not None
        and ("/" not in path or not file.parent.is_dir())
    )


def _hub_dataset(path: str, *, name: str | None, split: str | None) -> Dataset:
    import datasets
    from datasets.utils import are_progress_bars_disabled

    quiet = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"no such file, and the hub gave no such data set ({error}); check the name, split and connection",
            where=path,
        ) from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise RequestError(f"has the splits {', '.join(data)}; choose one with split", where=path)
    return next(iter(data.values()))


def _file_dataset(path: Path) -> Dataset:
    """A file's records as JSON text, with the line on which each begins.

    Text, because the readers of `datasets` infer types, which changes data: strings like 1998-05-03 become datetimes,
    and in CSV 007 becomes a number and NA becomes None. Nor do they name the line of broken JSON, and each version of
    the file leaves a copy in the cache.
    """
    from datasets import Dataset

    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        raise RequestError(
            f"is a folder; name a file in it ({', '.join(files) or 'it has none to read'})", where=str(path)
        )
    if not path.exists():
        raise missing_file(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise RequestError(
            f"unknown extension {path.suffix!r}; records are read from {', '.join(_SUFFIXES)}", where=str(path)
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RequestError("not UTF-8; save the file as UTF-8", where=f"{path}, line {line}") from error
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(text, path)
    else:
        rows = _json_array(text, path) if text.lstrip().startswith("[") else _json_lines(text, path)
    lines, records = [], []
    for line, row in rows:
        if not isinstance(row, dict):
            raise RequestError(
                f"must be an object with the record's fields, not {row!r:.40}", where=f"{path}, line {line}"
            )
        lines.append(line)
        records.append(json.dumps(row))
    return Dataset.from_dict({"line": lines, "record": records})


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines: JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _loads(line, path, number)


def _json_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    _loads(text, path, 1)  # from here on the text is known to be a list
    position, line = text.index("[") + 1, 1
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    counted = 0
    while (start := between.match(text, position).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        record, position = decoder.raw_decode(text, start)
        yield line, record


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"broken JSON at column {error.colno}: {error.msg}; one object a line, or one list of objects, is expected",
            where=f"{path}, line {first_line + error.lineno - 1}",
        ) from error


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(header):
                raise RequestError(
                    f"{len(cells)} cells under {len(header)} columns; put cells that hold a comma in "
                    '"double quotes", and a comma after each cell that is empty',
                    where=f"{path}, line {line}",
                )
            elif cells:
                yield line, dict(zip(header, cells, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"broken CSV: {error}; check the quotes", where=f"{path}, line {line}") from error
