"""Tasks in which one of a few options is right."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from rect_lightning.tasks.task import Part, PromptTask, Record


class Choice(PromptTask):
    """One prompt, and options of which one is right; `gold` gives its place.

    ``option``: the right option is the likeliest one, by the log-likelihood of all its tokens. ``generated``: what the model
    writes begins with the right option, in any case and quotes.
    """

    new_tokens = 4
    stop = ()
    main = "option"

    @abstractmethod
    def options(self, record: Record) -> Sequence[str]:
        """The options, in order."""

    def parse(self, record: Record, texts: Sequence[str]) -> int | None:
        """The place of the option that the text begins with; of several the longest."""
        options = self.options(record)
        found = [i for i, o in enumerate(options) if re.match(rf"\W*{re.escape(o)}(?!\w)", texts[0], re.IGNORECASE)]
        return max(found, key=lambda i: len(options[i]), default=None)

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """Whether the option written is the right one."""
        return {"generated": float(answer == self.gold(record))}

    def by_likelihood(self, record: Record, log_likelihoods: Sequence[float]) -> dict[str, Part]:
        """Whether the likeliest option is the right one; of several that are equally likely each gets a share."""
        likeliest = [i for i, value in enumerate(log_likelihoods) if value == max(log_likelihoods)]
        return {"option": (self.gold(record) in likeliest) / len(likeliest)}

    def solution(self, record: Record) -> list[str]:
        """The right option."""
        return [self.options(record)[self.gold(record)]]


def label(value: Any, names: Sequence[str]) -> int:
    """A label given as a number or as one of the names.

    Raises:
        ValueError: It is neither.
    """
    if str(value) in names:
        return list(names).index(str(value))
    if str(value) in map(str, range(len(names))):
        return int(value)
    raise ValueError(f"the label is {value!r}; expected 0 to {len(names) - 1}, or {' or '.join(names)}.")
