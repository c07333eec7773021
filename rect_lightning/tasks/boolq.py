"""Closed-domain question answering: BoolQ (Clark et al. 2019)."""

from collections.abc import Sequence

from rect_lightning.tasks.choice import Choice, label
from rect_lightning.tasks.task import Record


class BoolQ(Choice):
    """Questions that a passage answers with yes or no.

    ``paper``: one new token is " yes" or " no", with exactly one leading space, in any case.
    """

    name = "boolq"
    hub = ("google/boolq", None, "validation")
    columns = {"question": str, "passage": str, "answer": (bool, int, str)}
    paper_tokens = 1

    def prompts(self, record: Record) -> list[str]:
        """The published prompt."""
        return [
            "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'. passage: "
            f"{record['passage']} question: {record['question']}. answer:"
        ]

    def options(self, record: Record) -> Sequence[str]:
        """In the order of false and true."""
        return ("no", "yes")

    def gold(self, record: Record) -> int:
        """The answer, true or false."""
        return label(str(record["answer"]).lower(), ("false", "true"))

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether the text is the right word and a space, and nothing else."""
        return float(texts[0].lower() == f" {self.options(record)[self.gold(record)]}")
