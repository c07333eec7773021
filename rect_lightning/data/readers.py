"""Read edit requests from CounterFact, zsRE or a user's own records, in a file or on the hub."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rect_lightning.data.request import PLACEHOLDER, EditRequest, Neighbour, RequestError

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["auto", "counterfact", "zsre", "plain"]
ZsreTarget = Literal["alt", "answer"]

_SUFFIXES = (".json", ".jsonl", ".csv")
_LISTED = 5  # of many findings of one kind, a message lists so many

# The columns that a format needs (it is recognised by them), and those that it may have.
_COLUMNS = {
    "counterfact": (
        ("requested_rewrite",),
        ("case_id", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts"),
    ),
    "zsre": (("subject", "src", "answers"), ("alt", "rephrase", "loc", "loc_ans", "record_id", "case_id")),
    "plain": (
        ("subject", "prompt", "target_new"),
        ("target_true", "paraphrases", "neighbours", "generation_prompts", "relation", "id"),
    ),
}


def read_requests(
    path: str | Path,
    *,
    format: Format = "auto",
    split: str | None = None,
    zsre_target: ZsreTarget = "alt",
    name: str | None = None,
) -> list[EditRequest]:
    """Read edit requests and warn of those that contradict or repeat each other.

    All strings are stripped. A string where a list belongs, as in CSV, is read as JSON if it begins with ``[``, and is
    split at ``|`` otherwise.

    * ``counterfact`` (Meng et al. 2022): the neighbours' answer is the true target.
    * ``zsre`` (as split for MEND, Mitchell et al. 2022): ``src`` is the prompt, ``rephrase`` the paraphrase, ``loc``
      and ``loc_ans`` the neighbour, all taken as they are. In 21 of 700 evaluation and 19 of 1,000 training records
      ``alt`` is blank or the true answer: records without a usable target are left out, with a warning.
    * ``plain``: columns named like the fields of `EditRequest`. ``neighbours`` holds ``{prompt, answer}`` objects, or
      prompts whose answer is the true target. A record without ``id`` gets its line number.

    In zsRE and plain prompts without ``{}`` the subject itself is replaced: its first occurrence as a whole word, or
    else its first.

    Args:
        path: A .json, .jsonl or .csv file, or the name of a data set on the hub.
        format: What the records look like; "auto" tells by the columns.
        split: Which split of a hub data set; needed where there are several.
        zsre_target: Edit zsRE towards "alt", a wrong answer, with the first of ``answers`` as the true target (RECT, Gu
            et al. 2024), or towards "answer", the first of ``answers``, with no true target (ROME, MEMIT).
        name: Which configuration of a hub data set.

    Returns:
        The requests, in the order of the file.

    Raises:
        RequestError: If anything in the file is wrong, naming file, line and field.
        FileNotFoundError: If the file is not there.
        ValueError: If an option has no such value, or does not go with a file.
    """
    requests = parse_requests(path, format=format, split=split, zsre_target=zsre_target, name=name)
    warn_of_conflicts(requests)
    return requests


def parse_requests(
    path: str | Path,
    *,
    format: Format = "auto",
    split: str | None = None,
    zsre_target: ZsreTarget = "alt",
    name: str | None = None,
) -> list[EditRequest]:
    """Do as `read_requests`, without comparing the requests: for who wants only some of them."""
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, not {format!r}")
    if zsre_target not in get_args(ZsreTarget):
        raise ValueError(f"zsre_target must be one of {', '.join(get_args(ZsreTarget))}, not {zsre_target!r}")
    numbered = read_records(path, split=split, name=name)
    kind = _check_columns(list(dict.fromkeys(column for *_, row in numbered for column in row)), format, str(path))
    file_fields = _file_fields(kind, zsre_target)

    requests: list[EditRequest] = []
    errors: list[RequestError] = []
    unusable: list[RequestError] = []
    for where, number, row in numbered:
        try:
            requests.append(_to_request(kind, row, number, zsre_target))
        except RequestError as error:
            field = file_fields.get(error.field or "", error.field)
            located = RequestError(error.problem, field=field, where=where)
            # Part of the published zsRE, so nothing that its user could mend.
            (unusable if kind == "zsre" and error.field == "target_new" else errors).append(located)
    if not errors and not requests:
        errors = unusable
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RequestError(_listed(map(str, errors), f"{len(errors)} of {len(numbered)} records cannot be used"))
    if unusable:
        header = f"left out {len(unusable)} of {len(numbered)} zsRE records, which have no usable target"
        warnings.warn(_listed(map(str, unusable), header), stacklevel=3)
    return requests


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
            raise ValueError(f"split and name are for hub data sets, but {path} is a file; leave them out")
        unit = "line"
        numbered = [(row["line"], json.loads(row["record"])) for row in _file_dataset(Path(path).expanduser())]
    if not numbered:
        raise RequestError("no records; is it the right file?", where=str(path))
    return [(f"{path}, {unit} {number}", number, row) for number, row in numbered]


def warn_of_conflicts(requests: Iterable[EditRequest]) -> None:
    """Warn of requests that give one subject and relation (or prompt) different targets, and of exact repetitions."""
    facts: dict[tuple[str, str], list[EditRequest]] = defaultdict(list)
    copies: dict[tuple[str, str, str], list[EditRequest]] = defaultdict(list)
    for request in requests:
        facts[request.subject, request.relation or request.prompt].append(request)
        copies[request.subject, request.prompt, request.target_new].append(request)
    contradictions = [
        f"{subject!r}, {relation!r}: " + ", ".join(f"{request.target_new!r} (id {request.id})" for request in group)
        for (subject, relation), group in facts.items()
        if len({request.target_new for request in group}) > 1
    ]
    repetitions = [
        f"{group[0].text!r} -> {target!r}: id " + ", ".join(request.id for request in group)
        for (_, _, target), group in copies.items()
        if len(group) > 1
    ]
    if contradictions:
        header = f"{len(contradictions)} facts get contradictory targets, of which at most one can hold after editing"
        warnings.warn(_listed(contradictions, header), stacklevel=3)
    if repetitions:
        warnings.warn(_listed(repetitions, f"{len(repetitions)} requests are repeated word for word"), stacklevel=3)


def missing_file(path: Path) -> FileNotFoundError:
    """The error for a file that is not there, with the near names in its folder."""
    if not path.parent.is_dir():
        return FileNotFoundError(f"{path} is not there, and neither is its folder")
    near = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.iterdir()), cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "no file in its folder has a similar name"
    return FileNotFoundError(f"{path} is not there; {hint}")


def _listed(findings: Iterable[str], header: str) -> str:
    findings = list(findings)
    more = [f"and {len(findings) - _LISTED} more"] if len(findings) > _LISTED else []
    return "\n  ".join([f"{header}:", *findings[:_LISTED], *more])


# ---- where records come from ----


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


# ---- what records look like ----


def _check_columns(found: list[str], format: Format, path: str) -> str:
    """The records' format, told by their columns where it is "auto"."""
    candidates = list(_COLUMNS) if format == "auto" else [format]
    matches = [candidate for candidate in candidates if set(_COLUMNS[candidate][0]) <= set(found)]
    if "plain" in (matches[:1] or candidates):
        known = [*_COLUMNS["plain"][0], *_COLUMNS["plain"][1]]
        for column in found:
            # A misspelt optional column would be dropped in silence, and with it a whole metric.
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.8)
            if column not in known and near and near[0] not in found:
                raise RequestError(f"unknown column; rename it to {near[0]!r}, or remove it", field=column, where=path)
    if not matches:
        expected = [
            f"{candidate}: {', '.join(_COLUMNS[candidate][0])}; optional {', '.join(_COLUMNS[candidate][1])}"
            for candidate in candidates
        ]
        raise RequestError(_listed(expected, f"wrong columns: found {', '.join(found)}; expected"), where=path)
    return matches[0]


def _file_fields(kind: str, zsre_target: ZsreTarget) -> dict[str, str]:
    """What a format calls the fields of `EditRequest`, for messages."""
    if kind == "counterfact":
        rewrite = {field: f"requested_rewrite.{field}" for field in ("subject", "prompt")}
        targets = {field: f"requested_rewrite.{field}.str" for field in ("target_new", "target_true")}
        return {**rewrite, **targets, "neighbours": "neighborhood_prompts"}
    if kind == "zsre":
        return {
            "prompt": "src",
            "target_new": "alt" if zsre_target == "alt" else "answers",
            "target_true": "answers",
            "neighbours": "loc",
        }
    return {}


def _to_request(kind: str, row: dict[str, Any], number: int, zsre_target: ZsreTarget) -> EditRequest:
    if kind == "counterfact":
        return _counterfact(row, number)
    if kind == "zsre":
        return _zsre(row, number, zsre_target)
    return _plain(row, number)


def _counterfact(row: dict[str, Any], number: int) -> EditRequest:
    rewrite = _object(row.get("requested_rewrite"), "requested_rewrite")
    new = _object(rewrite.get("target_new"), "target_new")
    true = _text(_object(rewrite.get("target_true") or {}, "target_true").get("str"), "target_true") or None
    return EditRequest(
        id=_text(row.get("case_id"), "case_id") or str(number),
        subject=_text(rewrite.get("subject"), "subject"),
        prompt=_text(rewrite.get("prompt"), "prompt"),
        target_new=_text(new.get("str"), "target_new"),
        target_true=true,
        paraphrases=_texts(row.get("paraphrase_prompts"), "paraphrase_prompts"),
        neighbours=_neighbours(row.get("neighborhood_prompts"), true),
        generation_prompts=_texts(row.get("generation_prompts"), "generation_prompts"),
        relation=_text(rewrite.get("relation_id"), "relation_id") or None,
    )


def _zsre(row: dict[str, Any], number: int, zsre_target: ZsreTarget) -> EditRequest:
    subject = _text(row.get("subject"), "subject")
    answer = next(iter(_texts(row.get("answers"), "answers")), "")
    loc, rephrase = _text(row.get("loc"), "loc"), _text(row.get("rephrase"), "rephrase")
    towards_alt = zsre_target == "alt"
    return EditRequest(
        id=_text(row.get("record_id"), "record_id") or _text(row.get("case_id"), "case_id") or str(number),
        subject=subject,
        prompt=_with_placeholder(_text(row.get("src"), "src"), subject),
        target_new=_text(row.get("alt"), "alt") if towards_alt else answer,
        target_true=(answer or None) if towards_alt else None,
        paraphrases=(rephrase,) if rephrase else (),
        neighbours=(Neighbour(prompt=loc, answer=_text(row.get("loc_ans"), "loc_ans")),) if loc else (),
    )


def _plain(row: dict[str, Any], number: int) -> EditRequest:
    subject = _text(row.get("subject"), "subject")
    true = _text(row.get("target_true"), "target_true") or None
    return EditRequest(
        id=_text(row.get("id"), "id") or str(number),
        subject=subject,
        prompt=_with_placeholder(_text(row.get("prompt"), "prompt"), subject),
        target_new=_text(row.get("target_new"), "target_new"),
        target_true=true,
        paraphrases=_texts(row.get("paraphrases"), "paraphrases"),
        neighbours=_neighbours(row.get("neighbours"), true),
        generation_prompts=_texts(row.get("generation_prompts"), "generation_prompts"),
        relation=_text(row.get("relation"), "relation") or None,
    )


def _with_placeholder(prompt: str, subject: str) -> str:
    if PLACEHOLDER in prompt or not prompt or not subject:
        return prompt
    # Whole words first: "Ann" is not meant in "The annual report of Ann". Not only: some scripts do not part words.
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt) or re.search(re.escape(subject), prompt)
    if found is None:
        raise RequestError(
            f"subject not in the prompt: no {subject!r} in {prompt!r}; write {PLACEHOLDER} where the subject belongs",
            field="prompt",
        )
    return prompt[: found.start()] + PLACEHOLDER + prompt[found.end() :]


def _text(value: Any, field: str) -> str:
    """A cell's stripped text, empty if there is none."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RequestError(f"must be text, not {value!r:.40}; put it in quotes", field=field)
    return value.strip()


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"must be an object, not {value!r:.40}", field=field)
    return value


def _list(value: Any, field: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"broken JSON at column {error.colno}: {error.msg}; write a JSON list, or items separated by |",
                field=field,
            ) from error
    elif isinstance(value, str):
        value = [item for item in value.split("|") if item.strip()]
    if not isinstance(value, list):
        raise RequestError(f"must be a list, not {value!r:.40}", field=field)
    return value


def _texts(value: Any, field: str) -> tuple[str, ...]:
    texts = tuple(_text(item, field) for item in _list(value, field))
    if "" in texts:
        raise RequestError("holds an empty text; remove it", field=field)
    return texts


def _neighbours(value: Any, target_true: str | None) -> tuple[Neighbour, ...]:
    neighbours = []
    for item in _list(value, "neighbours"):
        if isinstance(item, dict):
            prompt, answer = item.get("prompt"), item.get("answer")
        elif target_true is None:
            raise RequestError(
                f"{item!r:.60} has no answer; give the request a target_true, or write {{prompt, answer}} objects",
                field="neighbours",
            )
        else:
            prompt, answer = item, target_true
        neighbours.append(Neighbour(prompt=_text(prompt, "neighbours"), answer=_text(answer, "neighbours")))
    return tuple(neighbours)
