"""Natural language inference: RTE (Dagan et al. 2005; GLUE, Wang et al. 2019)."""

from collections.abc import Sequence

from rect_lightning.tasks.choice import Choice, label
from rect_lightning.tasks.task import Record


class RTE(Choice):
    """Whether one sentence follows from another.

    ``paper``: "true" or "false" occurs in one new token; whether the label is the right one is counted over all records (the
    published script prints that, and the same over the records in which either occurs). The paper reports the train split.
    """

    name = "rte"
    hub = ("nyu-mll/glue", "rte", "validation")
    columns = {"sentence1": str, "sentence2": str, "label": (int, str)}
    paper_tokens = 1

    def prompts(self, record: Record) -> list[str]:
        """The published prompt."""
        return [f"{record['sentence1']} entails the {record['sentence2']}. True or False? answer:"]

    def options(self, record: Record) -> Sequence[str]:
        """As the prompt names them."""
        return ("True", "False")

    def gold(self, record: Record) -> int:
        """GLUE's label: 0 is an entailment."""
        return label(record["label"], ("entailment", "not_entailment"))

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether the right one of "true" and "false" occurs."""
        return float(self.options(record)[self.gold(record)].lower() in texts[0].lower())
