"""Summarization: SAMSum (Gliwa et al. 2019)."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rect_lightning.tasks.scores import rouge
from rect_lightning.tasks.task import Part, PromptTask, Record


class SAMSum(PromptTask):
    r"""Summaries of chats.

    ``paper``: the mean of the F-measures of ROUGE-1, -2 and -L of 25 new tokens, without their last 13 characters: those of
    GPT-2's end-of-text token, which is rarely there, so that mostly the last words are lost. The published script takes
    another implementation of ROUGE. ``rouge1``, ``rouge2``, ``rougeL``: of the first line, as it is.
    """

    name = "samsum"
    hub = ("knkarthick/samsum", None, "validation")
    columns = {"dialogue": str, "summary": str}
    new_tokens = 60
    paper_tokens = 25
    main = "rougeL"

    def prompts(self, record: Record) -> list[str]:
        """The published prompt."""
        return [f"{record['dialogue']}\nTL;DR:"]

    def gold(self, record: Record) -> str:
        """The summary that a person wrote."""
        if not record["summary"].strip():
            raise ValueError("the summary is empty.")
        return str(record["summary"])

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """ROUGE of what is left; 0 if that is at most one character."""
        text = texts[0].split("DR:")[-1][:-13]
        return fmean(rouge(text, self.gold(record)).values()) if len(text) > 1 else 0.0

    def parse(self, record: Record, texts: Sequence[str]) -> str | None:
        """The first line."""
        return texts[0] or None

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """ROUGE by torchmetrics."""
        return dict(rouge(answer or "", self.gold(record)))

    def solution(self, record: Record) -> list[str]:
        """The summary, on one line."""
        return [" ".join(self.gold(record).split())]
