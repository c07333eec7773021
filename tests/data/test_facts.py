"""The facts and the prose that the package ships keep the rules that edits and metrics rely on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import rect_lightning

DATA = Path(rect_lightning.__file__).parent / "data"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    with (DATA / "facts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _prompts(record: dict[str, Any]) -> list[str]:
    return record["paraphrase_prompts"] + record["neighborhood_prompts"] + record["generation_prompts"]


def test_schema(records):
    for record in records:
        assert set(record) == {
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "generation_prompts",
        }
        rewrite = record["requested_rewrite"]
        assert set(rewrite) == {"prompt", "relation_id", "subject", "target_new", "target_true"}
        assert set(rewrite["target_new"]) == set(rewrite["target_true"]) == {"str"}


def test_there_are_enough_records_numbered_in_order(records):
    assert len(records) >= 220
    assert [record["case_id"] for record in records] == list(range(len(records)))


def test_relations_are_many_and_well_mixed(records):
    relations = [record["requested_rewrite"]["relation_id"] for record in records]
    assert len(set(relations)) >= 12
    assert len(set(relations[:50])) >= 0.9 * len(set(relations))
    assert max(Counter(relations).values()) < 0.15 * len(records)


def test_each_subject_has_a_relation_once(records):
    pairs = Counter((r["requested_rewrite"]["subject"], r["requested_rewrite"]["relation_id"]) for r in records)
    assert [pair for pair, count in pairs.items() if count > 1] == []


def test_prompts_hold_one_placeholder_and_no_target(records):
    for record in records:
        rewrite = record["requested_rewrite"]
        prompt = rewrite["prompt"]
        assert prompt.count("{}") == 1, prompt
        assert prompt.count("{") == prompt.count("}") == 1, prompt
        assert rewrite["subject"] not in prompt
        assert rewrite["target_true"]["str"].casefold() not in prompt.format(rewrite["subject"]).casefold(), prompt


def test_targets_are_short_and_differ(records):
    for record in records:
        true, new = (record["requested_rewrite"][key]["str"] for key in ("target_true", "target_new"))
        assert true.casefold() != new.casefold()
        for target in (true, new):
            assert 1 <= len(target.split()) <= 3, target
            assert target == target.strip(), target
            assert target.split()[0].casefold() not in {"a", "an", "the"}, target


def test_target_new_is_of_the_type_of_target_true(records):
    """Capitalisation tells names from common nouns, and within a relation all targets are one or the other."""
    capitalised: dict[str, set[bool]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        for key in ("target_true", "target_new"):
            capitalised.setdefault(rewrite["relation_id"], set()).add(rewrite[key]["str"][0].isupper())
    assert [relation for relation, kinds in capitalised.items() if len(kinds) > 1] == []


def test_number_of_prompts(records):
    for record in records:
        assert len(record["paraphrase_prompts"]) == 2
        assert 4 <= len(record["neighborhood_prompts"]) <= 6
        assert len(record["generation_prompts"]) == 2


def test_prompts_are_clean_and_distinct_within_a_record(records):
    for record in records:
        rewrite = record["requested_rewrite"]
        prompts = [rewrite["prompt"].format(rewrite["subject"]), *_prompts(record)]
        assert len(set(prompts)) == len(prompts), record["case_id"]
        for prompt in prompts:
            assert prompt == " ".join(prompt.split()), prompt
            assert prompt[-1] not in ".?!:;", prompt
            assert "{" not in prompt, prompt
            assert "the the " not in prompt.casefold(), prompt


def test_paraphrases_and_generation_prompts_hold_the_subject(records):
    for record in records:
        subject = record["requested_rewrite"]["subject"]
        for prompt in record["paraphrase_prompts"] + record["generation_prompts"]:
            assert subject in prompt, prompt


def test_paraphrases_do_not_give_the_answer_away(records):
    for record in records:
        rewrite = record["requested_rewrite"]
        for prompt in record["paraphrase_prompts"]:
            text = prompt.replace(rewrite["subject"], "").casefold()
            assert rewrite["target_true"]["str"].casefold() not in text, prompt
            assert rewrite["target_new"]["str"].casefold() not in text, prompt


def test_neighbours_do_not_hold_the_subject_or_the_answer(records):
    for record in records:
        rewrite = record["requested_rewrite"]
        for prompt in record["neighborhood_prompts"]:
            for text in (rewrite["subject"], rewrite["target_true"]["str"], rewrite["target_new"]["str"]):
                assert text.casefold() not in prompt.casefold(), prompt


def test_no_neighbour_asks_for_what_another_record_edits(records):
    """Else a sequential or batch edit of all records would be blamed for doing what it was asked to."""
    edited: dict[str, set[str]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        edited.setdefault(rewrite["target_true"]["str"], set()).add(rewrite["subject"].casefold())
    for record in records:
        for prompt in record["neighborhood_prompts"]:
            clashes = [s for s in edited[record["requested_rewrite"]["target_true"]["str"]] if s in prompt.casefold()]
            assert clashes == [], prompt


def test_prose_is_long_enough_and_has_paragraphs():
    prose = (DATA / "prose.txt").read_text(encoding="utf-8")
    paragraphs = prose.strip().split("\n\n")
    assert 1500 <= len(prose.split()) <= 2200
    assert len(paragraphs) >= 10
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(p == p.strip() and p.endswith(".") and "\n" not in p for p in paragraphs)
