"""What the records of CounterFact, of zsRE and of a user's own file look like, and the edit requests that they become."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, Literal

from rect_lightning.data.request import PLACEHOLDER, EditRequest, Neighbour, RequestError, listed

Format = Literal["auto", "counterfact", "zsre", "plain"]
ZsreTarget = Literal["alt", "answer"]

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


def check_columns(found: list[str], format: Format, path: str) -> str:
    """The records' format, told by their columns where it is "auto".

    Raises:
        RequestError: If columns are missing, or one is nearly named as one that is known.
    """
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
        raise RequestError(listed(expected, f"wrong columns: found {', '.join(found)}; expected"), where=path)
    return matches[0]


def file_fields(kind: str, zsre_target: ZsreTarget) -> dict[str, str]:
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


def to_request(kind: str, row: dict[str, Any], number: int, zsre_target: ZsreTarget) -> EditRequest:
    """The request that a record asks for; the number is its id where it has none.

    Raises:
        RequestError: If it cannot be used, naming the field, by the record's name or by that of `EditRequest`.
    """
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
