"""Sentiment: SST-2 (Socher et al. 2013; GLUE, Wang et al. 2019)."""

from collections.abc import Sequence

from rect_lightning.tasks.choice import Choice, label
from rect_lightning.tasks.task import Record


class SST2(Choice):
    """Whether a snippet of a film review is positive.

    ``paper``: the right one of "positive" and "negative" occurs in one new token. Where a tokenizer takes several tokens for
    either word, that cannot be.
    """

    name = "sst2"
    hub = ("nyu-mll/glue", "sst2", "validation")
    columns = {"sentence": str, "label": (int, str)}
    paper_tokens = 1

    def prompts(self, record: Record) -> list[str]:
        """The published prompt, which lacks two spaces."""
        return [
            "For each snippet of text,label the sentiment of the text as positive or negative.The answer should be exact "
            f"'positive' or 'negative'. text: {record['sentence']} answer:"
        ]

    def options(self, record: Record) -> Sequence[str]:
        """In the order of the labels."""
        return ("negative", "positive")

    def gold(self, record: Record) -> int:
        """GLUE's label."""
        return label(record["label"], self.options(record))

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether the right word occurs."""
        return float(self.options(record)[self.gold(record)] in texts[0].lower())
