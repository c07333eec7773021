"""Dialogue: MuTual (Cui et al. 2020)."""

import re
from collections.abc import Sequence

from rect_lightning.tasks.choice import Choice, label
from rect_lightning.tasks.task import Record

_LETTERS = ("A", "B", "C", "D")


class MuTual(Choice):
    """Which of four turns goes on with a dialogue.

    ``paper``: the right letter occurs in one new token, so that "But" is right where the answer is B. Position decides much in
    small models: look at ``option`` beside 0.25, what guessing gives.
    """

    name = "mutual"
    hub = ("tasksource/mutual", None, "validation")
    columns = {"article": str, "options": list, "answers": str}
    paper_tokens = 1

    def prompts(self, record: Record) -> list[str]:
        """The published prompt, spelt as it was."""
        choices = "".join(f"({letter}){option}" for letter, option in zip(_LETTERS, record["options"], strict=True))
        return [
            f"Q: {record['article']} Which choice is correct? Answer Chioces: {choices} A: Among A through D, the answer is"
        ]

    def options(self, record: Record) -> Sequence[str]:
        """The letters."""
        return _LETTERS

    def parse(self, record: Record, texts: Sequence[str]) -> int | None:
        """A letter with which the text begins: in brackets, or with no word after it, so that "A good idea" gives none."""
        found = re.match(r"\(([A-D])\)|([A-D])(?!\w|\s+\w)", texts[0])
        return None if found is None else _LETTERS.index(found[1] or found[2])

    def gold(self, record: Record) -> int:
        """The right letter."""
        if len(record["options"]) != len(_LETTERS):
            raise ValueError(f"there are {len(record['options'])} options instead of {len(_LETTERS)}.")
        return label(record["answers"], _LETTERS)

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether the right letter occurs."""
        return float(record["answers"] in texts[0])
