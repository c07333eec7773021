"""Open-domain question answering: Natural Questions (Kwiatkowski et al. 2019; NQ-open, Lee et al. 2019)."""

from collections.abc import Sequence
from typing import Any

from rect_lightning.metrics import normalised_words
from rect_lightning.tasks.scores import exact, f1
from rect_lightning.tasks.task import Part, PromptTask, Record


class NQ(PromptTask):
    """Questions that people asked a search engine.

    ``paper``: the prompt has a passage, from a column ``passage`` that NQ-open does not have; without one that part is left
    out. The published script looks for the answer in all that comes after the last "Answer:", which the prompt does not have,
    so mostly in prompt and continuation together: any words in a row that are an answer count, those of the passage too. It
    has two faults more, which depend on the order of the records and are not repeated here: one-word answers count as often as
    they occur, and after the first hit of several words only the first word of each output is tried. ``exact`` and ``f1``: the
    first line after a plain prompt, as in SQuAD.
    """

    name = "nq"
    hub = ("google-research-datasets/nq_open", None, "validation")
    columns = {"question": str, "answer": list}
    new_tokens = 20
    paper_tokens = 20
    main = "exact"

    def prompts(self, record: Record) -> list[str]:
        """A plain question."""
        return [f"Question: {record['question']}\nAnswer:"]

    def paper_prompts(self, record: Record) -> list[str]:
        """The published prompt."""
        passage = f"Passage: {record['passage']} " if record.get("passage") else ""
        task = "Refer to the passage below and answer the following question."
        return [f"{task} {passage}Question: {record['question']}"]

    def gold(self, record: Record) -> list[str]:
        """All answers, each right."""
        answers = [answer for answer in record["answer"] if isinstance(answer, str) and normalised_words(answer)]
        if not answers:
            raise ValueError(f"answer is {record['answer']!r:.40}, without any text.")
        return answers

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether an answer occurs as whole words in what stands after the last "Answer:"."""
        whole = f"{self.paper_prompts(record)[0]}{texts[0]}".split("Answer:")[-1]
        said = f" {' '.join(normalised_words(whole))} "
        return float(any(f" {' '.join(normalised_words(answer))} " in said for answer in self.gold(record)))

    def parse(self, record: Record, texts: Sequence[str]) -> str | None:
        """The first line."""
        return texts[0] if normalised_words(texts[0]) else None

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """Exact match and F1 of words, against the nearest answer."""
        gold = self.gold(record)
        return {"exact": exact(answer or "", gold), "f1": f1(answer or "", gold)}

    def solution(self, record: Record) -> list[str]:
        """The first answer."""
        return self.gold(record)[:1]
