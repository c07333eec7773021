"""Named entity recognition: CoNLL-2003 (Tjong Kim Sang and De Meulder 2003)."""

import re
from collections.abc import Sequence
from typing import Any

from rect_lightning.tasks.scores import Ratio
from rect_lightning.tasks.task import Part, PromptTask, Record

_KINDS = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_NONE = {"", "none", "n/a", "no", "nothing", "no entities", "no entity"}


class CoNLL2003(PromptTask):
    """The persons, locations, organizations and other names in a sentence, each kind asked by a prompt of its own.

    ``paper``: the share of entities that occur in 10 new tokens, by kind, then the mean over kinds: a recall. The published
    script ends an entity at the next O, so that neighbours become one, and takes the last word from one that ends the sentence
    (nothing is left of a single word, which then counts as found). Where there is none of a kind, writing nothing counts as one
    found; writing something counts as one missed for miscellaneous only. ``f1``: what the model lists, separated by commas on
    one line, becomes tags of the words, and whole entities of the right kind count, as seqeval finds them. What is listed but
    is not in the sentence is an entity too many.
    """

    name = "conll2003"
    hub = ("lhoestq/conll2003", None, "validation")
    columns = {"tokens": list, "ner_tags": list}
    new_tokens = 32
    paper_tokens = 10
    main = "f1"

    def prepare(self, limit: int | None = None) -> None:
        """Also see that seqeval is there."""
        _entities(["O"])
        super().prepare(limit)

    def prompts(self, record: Record) -> list[str]:
        """The published prompts. Commas and full stops follow without a space, and nothing else does."""
        text = "".join(token if token in (",", ".") else f" {token}" for token in record["tokens"])[1:]
        return [f"Please identify {kind} Entity from the given text. Text: {text} Entity:" for kind in _KINDS.values()]

    def gold(self, record: Record) -> list[str]:
        """The tags as text, such as B-PER."""
        tags = record["ner_tags"]
        if len(tags) != len(record["tokens"]) or not tags:
            raise ValueError(f"{len(record['tokens'])} tokens have {len(tags)} tags.")
        names = [_TAGS[tag] if isinstance(tag, int) and 0 <= tag < len(_TAGS) else tag for tag in tags]
        if unknown := [name for name in names if name not in _TAGS]:
            raise ValueError(f"the tag {unknown[0]!r} is unknown; expected 0 to 8, or {', '.join(_TAGS)}.")
        return names

    def paper(self, record: Record, texts: Sequence[str]) -> Ratio:
        """What was found and what there was, for each kind."""
        found, there = [], []
        for kind, text in zip(_KINDS, texts, strict=True):
            said = text.split("Entity:")[0]
            entities = published_entities(record["tokens"], self.gold(record), kind)
            found.append(float(sum(entity in said for entity in entities) if entities else not said))
            there.append(float(len(entities) if entities else not said or kind == "MISC"))
        return Ratio(tuple(found), tuple(there))

    def parse(self, record: Record, texts: Sequence[str]) -> dict[str, list[str]] | None:
        """For each kind, tags of the words, and of one word more for each thing listed that is not there.

        None if things are listed, and none of them is in the sentence.
        """
        words = [token.lower() for token in record["tokens"]]
        found, lost = {}, 0
        for kind, text in zip(_KINDS, texts, strict=True):
            tags, extra = ["O"] * len(words), []
            for item in re.split("[,;]", text):
                name = item.strip(" .\"'()-*").lower()
                place = _free_place(words, tags, name.split())
                if place is not None:
                    tags[place] = [f"B-{kind}"] + [f"I-{kind}"] * (len(tags[place]) - 1)
                elif name not in _NONE:
                    extra.append(f"B-{kind}")
            found[kind], lost = tags + extra, lost + len(extra)
        return None if lost and not any(tag != "O" for tags in found.values() for tag in tags[: len(words)]) else found

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """What micro-averaged F1 is made of: twice the entities found, over those listed and those there."""
        listed = set().union(*(_entities(tags) for tags in (answer or {}).values()))
        there = _entities(self.gold(record))
        return {"f1": Ratio((2.0 * len(listed & there),), (float(len(listed) + len(there)),))}

    def solution(self, record: Record) -> list[str]:
        """The entities of each kind."""
        entities = sorted(_entities(self.gold(record)), key=lambda entity: entity[1])
        named = [(kind, " ".join(record["tokens"][start : end + 1])) for kind, start, end in entities]
        return [", ".join(name for kind, name in named if kind == wanted) or "none" for wanted in _KINDS]


def published_entities(tokens: Sequence[str], tags: Sequence[str], kind: str) -> list[str]:
    """The entities of a kind as the published script cuts them."""
    entities, place = [], 0
    while place < len(tags):
        if tags[place] == f"B-{kind}":
            end = next((i for i in range(place, len(tags)) if tags[i] == "O"), len(tags) - 1)
            entities.append(" ".join(tokens[place:end]))
            place = end
        place += 1
    return entities


def _free_place(words: Sequence[str], tags: Sequence[str], name: Sequence[str]) -> slice | None:
    """Where the words of a name stand that have no tag yet."""
    for start in range(len(words) - len(name) + 1):
        place = slice(start, start + len(name))
        if name and list(words[place]) == list(name) and set(tags[place]) == {"O"}:
            return place
    return None


def _entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last place of each entity."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise ModuleNotFoundError("conll2003 is scored with seqeval: pip install 'rect_lightning[tasks]'.") from error
    return set(get_entities(list(tags)))
