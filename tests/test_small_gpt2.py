"""The small GPT-2 of the benchmarks: what it is taught, and its script from end to end."""

import csv
import json
from itertools import islice

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel

from benchmarks import small_gpt2
from benchmarks.world import COMMON, build_abilities, build_facts, edit_requests, mixed_texts
from rect_lightning.cli import main
from rect_lightning.data.readers import read_requests
from rect_lightning.models import Source

PEOPLE = 80


@pytest.fixture(scope="module")
def facts():
    return build_facts(people=PEOPLE, seed=0)


@pytest.fixture(scope="module")
def abilities(facts):
    return {ability.name: ability for ability in build_abilities(facts)}


@pytest.fixture(scope="module")
def told(abilities):
    """Training texts, long enough for each to occur that may."""
    return set(islice(mixed_texts([*abilities.values()], small_gpt2.SHARES, seed=0), 30_000))


def test_a_seed_gives_one_world(facts):
    assert build_facts(people=PEOPLE, seed=0) == facts
    assert build_facts(people=PEOPLE, seed=1) != facts
    assert edit_requests(facts, seed=0) == edit_requests(facts, seed=0)
    first, second, other = (
        [*islice(mixed_texts(build_abilities(facts), small_gpt2.SHARES, seed=seed), 200)] for seed in (0, 0, 1)
    )
    assert first == second != other


def test_names_and_facts_are_distinct_and_the_answers_evenly_dealt(facts):
    assert len({(fact.subject, fact.relation) for fact in facts}) == len(facts) == 4 * PEOPLE
    assert len({fact.subject.split()[1] for fact in facts}) == PEOPLE
    counts = [sum(f.answer == answer for f in facts) for answer in {f.answer for f in facts}]
    assert set(counts) == {PEOPLE // 20}


def test_too_many_people_are_refused():
    with pytest.raises(ValueError, match="from 4 to 400, not 401"):
        build_facts(people=401, seed=0)


def test_facts_are_told_as_they_are_and_not_as_they_are_held_out(facts, told):
    text = "\n".join(told)
    for fact in facts:
        assert all(f"{phrasing.format(fact.subject)} {fact.answer}." in text for phrasing in fact.told)
        assert not any(phrasing.format(fact.subject) in text for phrasing in fact.held_out)
    told_to = {phrasing for fact in facts for phrasing in fact.told}
    assert {phrasing for fact in facts for phrasing in fact.held_out} <= told_to, (
        "some people are told in each phrasing"
    )
    assert sum(not fact.held_out for fact in facts) == len(facts) / 2


def test_what_abilities_are_asked_on_held_out_records_is_never_told(abilities, told):
    text = "\n".join(told)
    reviews = abilities["sentiment"].records
    assert len(reviews) == 200
    assert not any(review["text"] in text for review in reviews)
    things = abilities["kinds"].records
    never = [record["thing"] for record in things if f"Everyone knows that the {record['thing']} is" not in text]
    assert never == [record["thing"] for record in things[::2]]
    assert all(f"{r['a']} + {r['b']} = {r['answer']}." in told for r in abilities["sums"].records)


def test_requests_are_read_and_leave_the_reserved_alone(facts, tmp_path, recwarn):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in edit_requests(facts, seed=0)))
    requests = read_requests(path)
    assert not recwarn, "no contradictions, no repetitions"
    true = {(fact.subject, fact.relation): fact for fact in facts}
    reserved = {fact.subject for fact in facts if fact.reserved}
    assert len(requests) == 3 * (PEOPLE - len(reserved))
    assert len({request.subject for request in requests[: len(requests) // 3]}) == PEOPLE - len(reserved)
    for request in requests:
        fact = true[request.subject, request.relation]
        assert request.subject not in reserved
        assert request.target_true == fact.answer != request.target_new
        assert request.prompt in fact.told
        assert request.paraphrases == tuple(p.format(fact.subject) for p in (fact.told + fact.held_out)[COMMON:])
        assert request.target_new in {f.answer for f in facts if f.relation == request.relation}
        for neighbour in request.neighbours:
            (subject,) = [name for name in reserved if name in neighbour.prompt]
            assert neighbour.answer == true[subject, request.relation].answer == fact.answer
    assert len({request.relation for request in requests}) == 4


def test_prose_that_is_held_out_is_not_trained_on():
    told, held_out = small_gpt2.split_prose("\n\n".join(map(str, range(81))))
    assert held_out == ["0", "40", "80"]
    assert told == [str(i) for i in range(81) if i % 40]
    with pytest.raises(ValueError, match="two documents"):
        small_gpt2.split_prose("one\n\n\n")


def test_rows_begin_with_a_text():
    texts = [f"{i} + 1 = {i + 1}." for i in range(10)]
    tokenizer = small_gpt2.train_tokenizer(texts, 300)
    rows = small_gpt2.training_rows(tokenizer, ["prose"], iter(texts * 200), 40, 16)
    prose, packed = rows[: round(small_gpt2.PROSE * 40)], rows[round(small_gpt2.PROSE * 40) :]
    assert rows.shape == (40, 16)
    assert set(tokenizer.decode(prose.flatten()).split("<|endoftext|>")[1:-1]) == {"prose"}
    assert all(tokenizer.decode(row).startswith(tuple(texts)) for row in packed)


def test_the_script_from_end_to_end(tmp_path, monkeypatch):
    small = {"people": 8, "steps": 3, "batch_size": 2, "layers": 2, "width": 16, "heads": 2, "vocabulary": 400}
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        small_gpt2.train(folder, context=64, **small)
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    model, tokenizer = Source(name=str(folders[0])).load()
    assert isinstance(model, GPT2LMHeadModel)
    assert model.config.activation_function == "gelu_new"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer("Ada speaks Latin.")["input_ids"]) == "Ada speaks Latin."
    learned = json.loads((folders[0] / "report.json").read_text())["learned"]
    assert {"facts/told", "facts/held_out", "recall/exact", "sums/exact"} < learned.keys()
    assert {"sentiment/option", "kinds/option", "perplexity/held_out"} < learned.keys()
    config = folders[0] / "rome.yaml"
    assert len(read_requests(yaml.safe_load(config.read_text())["data"]["path"])) == 18

    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(config), "--data.limit", "1", "--model.layers", "[1]", "--model.search.steps", "2"])
    with open("runs/version_0/side_effects.csv", newline="", encoding="utf-8") as file:
        measured = {row["score"]: float(row["value"]) for row in csv.DictReader(file) if row["edits"] == "0"}
    wanted = {name: value for name, value in learned.items() if not name.startswith("facts/")}
    assert measured == pytest.approx(wanted), "the files say what the script measured"
