"""Read edit requests from CounterFact, zsRE or a user's own records, in a file or on the hub."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from rect_lightning.data.formats import Format, ZsreTarget, check_columns, file_fields, to_request
from rect_lightning.data.records import read_records
from rect_lightning.data.request import EditRequest, RequestError, listed


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
    kind = check_columns(list(dict.fromkeys(column for *_, row in numbered for column in row)), format, str(path))
    names = file_fields(kind, zsre_target)

    requests: list[EditRequest] = []
    errors: list[RequestError] = []
    unusable: list[RequestError] = []
    for where, number, row in numbered:
        try:
            requests.append(to_request(kind, row, number, zsre_target))
        except RequestError as error:
            field = names.get(error.field or "", error.field)
            located = RequestError(error.problem, field=field, where=where)
            # Part of the published zsRE, so nothing that its user could mend.
            (unusable if kind == "zsre" and error.field == "target_new" else errors).append(located)
    if not errors and not requests:
        errors = unusable
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RequestError(listed(map(str, errors), f"{len(errors)} of {len(numbered)} records cannot be used"))
    if unusable:
        header = f"left out {len(unusable)} of {len(numbered)} zsRE records, which have no usable target"
        warnings.warn(listed(map(str, unusable), header), stacklevel=3)
    return requests


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
        warnings.warn(listed(contradictions, header), stacklevel=3)
    if repetitions:
        warnings.warn(listed(repetitions, f"{len(repetitions)} requests are repeated word for word"), stacklevel=3)
