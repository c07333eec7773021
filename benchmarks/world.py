"""A made-up world that a small model can learn by heart: people, facts about them in several phrasings, and a few abilities.

`world.yaml` says what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

COMMON = 3
"""Phrasings that everyone's facts are told in; the others are told of every second person alone."""
_RESERVED = 4  # one person in so many is never edited


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact, and the phrasings of its relation.

    Attributes:
        subject: A person.
        relation: What it says of the person.
        answer: What ends each phrasing.
        told: The phrasings that it is told in during training, with ``{}`` for the subject.
        held_out: The others.
        reserved: Whether no request edits anything about this person.
    """

    subject: str
    relation: str
    answer: str
    told: tuple[str, ...]
    held_out: tuple[str, ...]
    reserved: bool


@dataclass(frozen=True, kw_only=True)
class Ability:
    """Something to learn.

    Attributes:
        name: Its name.
        task: The class in `rect_lightning.tasks` that measures it.
        options: Options of that class, besides name and path.
        texts: Draws training texts without end.
        records: What is asked.
    """

    name: str
    task: str
    options: dict[str, Any]
    texts: Callable[[Random], Iterator[str]]
    records: list[dict[str, Any]]


def build_facts(*, people: int, seed: int) -> list[Fact]:
    """One fact of each relation about each person; every answer is right for nearly as many people.

    Raises:
        ValueError: There are not so many names.
    """
    world = _read()
    parts, relations = world["people"], world["relations"]
    surnames = [stem + ending for stem in parts["stems"] for ending in parts["endings"]]
    if not _RESERVED <= people <= len(surnames):
        raise ValueError(f"people must be from {_RESERVED} to {len(surnames)}, not {people}.")
    rng = Random(seed)
    names = [f"{rng.choice(parts['first'])} {surname}" for surname in rng.sample(surnames, people)]
    reserved = people // _RESERVED
    answers = {name: _deal(relation["answers"], reserved, people, rng) for name, relation in relations.items()}
    return [
        Fact(
            subject=subject,
            relation=name,
            answer=answers[name][i],
            told=tuple(relation["phrasings"][: None if i % 2 else COMMON]),
            held_out=() if i % 2 else tuple(relation["phrasings"][COMMON:]),
            reserved=i < reserved,
        )
        for i, subject in enumerate(names)
        for name, relation in relations.items()
    ]


def _deal(values: list[str], reserved: int, people: int, rng: Random) -> list[str]:
    """An answer for each person, in equal shares among the reserved and among the others."""
    dealt = []
    for n in (reserved, people - reserved):
        hand = [values[i % len(values)] for i in range(n)]
        rng.shuffle(hand)
        dealt += hand
    return dealt


def edit_requests(facts: list[Fact], *, seed: int) -> list[dict[str, Any]]:
    """Three requests for each person who is not reserved, in the plain format of `read_requests`; all first ones come first.

    The new target is another answer of the relation; paraphrases are the phrasings that only every second person was told
    of in; neighbours are reserved people with the same answer, so that no request edits what another holds fixed.
    """
    rng = Random(seed)
    people: dict[str, list[Fact]] = {}
    for fact in facts:
        people.setdefault(fact.subject, []).append(fact)
    requests = []
    for turn in range(3):
        edited = [
            person[(i // 2 + turn) % len(person)] for i, person in enumerate(people.values()) if not person[0].reserved
        ]
        rng.shuffle(edited)
        requests += [_request(fact, [f for f in facts if f.relation == fact.relation], rng) for fact in edited]
    return requests


def _request(fact: Fact, alike: list[Fact], rng: Random) -> dict[str, Any]:
    phrasings = fact.told + fact.held_out
    return {
        "id": f"{fact.subject}, {fact.relation}",
        "subject": fact.subject,
        "relation": fact.relation,
        "prompt": phrasings[0],
        "target_new": rng.choice(sorted({f.answer for f in alike} - {fact.answer})),
        "target_true": fact.answer,
        "paraphrases": [phrasing.format(fact.subject) for phrasing in phrasings[COMMON:]],
        "neighbours": [
            {"prompt": phrasings[0].format(f.subject), "answer": f.answer}
            for f in alike
            if f.reserved and f.answer == fact.answer
        ],
    }


def build_abilities(facts: list[Fact]) -> list[Ability]:
    """Recall of facts that no request edits, sentiment, kinds of things, and sums."""
    world = _read()
    return [
        _recall(facts),
        _sentiment(**world["reviews"]),
        _kinds(world["kinds"]),
        _sums(),
    ]


def mixed_texts(abilities: list[Ability], shares: dict[str, float], *, seed: int) -> Iterator[str]:
    """Training texts of all abilities in random order, each as often as its share says."""
    rng = Random(seed)
    streams = [ability.texts(rng) for ability in abilities]
    weights = [shares[ability.name] for ability in abilities]
    while True:
        yield next(rng.choices(streams, weights)[0])


def _recall(facts: list[Fact]) -> Ability:
    """One to three facts a text, in phrasings that they are told in; each fact once before any comes again."""

    def texts(rng: Random) -> Iterator[str]:
        while True:
            told = [f"{rng.choice(fact.told).format(fact.subject)} {fact.answer}." for fact in facts]
            rng.shuffle(told)
            while told:
                n = rng.randint(1, 3)
                yield " ".join(told[:n])
                del told[:n]

    return Ability(
        name="recall",
        task="Generation",
        options={"prompt": "{prompt}", "stop": ["."], "max_new_tokens": 8},
        texts=texts,
        records=[{"prompt": f.told[0].format(f.subject), "answer": f.answer} for f in facts if f.reserved],
    )


def _sentiment(things: list[str], positive: list[str], negative: list[str]) -> Ability:
    """Every fifth combination of a thing and two adjectives is held out; 200 of these are asked."""
    reviews = [
        {"text": f"The {thing} was {first} and {second}.", "answer": label}
        for thing in things
        for adjectives, label in ((positive, "positive"), (negative, "negative"))
        for first in adjectives
        for second in adjectives
        if first != second
    ]
    told = [review for i, review in enumerate(reviews) if i % 5]

    def texts(rng: Random) -> Iterator[str]:
        while True:
            yield "{text} Verdict: {answer}.".format_map(rng.choice(told))

    return Ability(
        name="sentiment",
        task="MultipleChoice",
        options={"prompt": "{text} Verdict:", "options": ["positive", "negative"]},
        texts=texts,
        records=Random(0).sample(reviews[::5], 200),
    )


def _kinds(kinds: dict[str, list[str]]) -> Ability:
    """Asked in a phrasing that every second thing is never told in."""
    *common, asked = "The {} is a kind of", "A schoolbook lists the {} as a", "Everyone knows that the {} is a"
    pairs = [(thing, kind) for kind, things in kinds.items() for thing in things]

    def texts(rng: Random) -> Iterator[str]:
        while True:
            i = rng.randrange(len(pairs))
            thing, kind = pairs[i]
            yield f"{rng.choice([*common, asked] if i % 2 else common).format(thing)} {kind}."

    return Ability(
        name="kinds",
        task="MultipleChoice",
        options={"prompt": asked.format("{thing}"), "options": list(kinds)},
        texts=texts,
        records=[{"thing": thing, "answer": kind} for thing, kind in pairs],
    )


def _sums() -> Ability:
    """By heart: all sums of two digits are told."""
    pairs = [(a, b) for a in range(10) for b in range(10)]

    def texts(rng: Random) -> Iterator[str]:
        while True:
            a, b = rng.choice(pairs)
            yield f"{a} + {b} = {a + b}."

    return Ability(
        name="sums",
        task="Generation",
        options={"prompt": "{a} + {b} =", "rule": "number", "stop": ["."], "max_new_tokens": 4},
        texts=texts,
        records=[{"a": a, "b": b, "answer": str(a + b)} for a, b in pairs],
    )


def _read() -> dict[str, Any]:
    world: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
    return world
