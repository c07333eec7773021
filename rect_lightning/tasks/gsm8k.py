"""Reasoning: GSM8K (Cobbe et al. 2021)."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rect_lightning.tasks.scores import last_number
from rect_lightning.tasks.task import Part, PromptTask, Record

_BEFORE_ANSWER = "Therefore, the answer (arabic numerals) is:"


class GSM8K(PromptTask):
    """Grade school mathematics.

    ``paper``: the published prompt holds the gold solution, up to its result, as a hint; the answer is right if the gold
    number occurs anywhere in 5 new tokens, so that a gold 5 is found in "15". ``exact``: the model reasons by itself, and the
    last number that it writes equals the gold one.
    """

    name = "gsm8k"
    hub = ("openai/gsm8k", "main", "test")
    columns = {"question": str, "answer": str}
    new_tokens = 256
    paper_tokens = 5
    stop = ("Q:", "Question:")
    main = "exact"

    def prompts(self, record: Record) -> list[str]:
        """The published prompt, without the hint."""
        return [f"Q: {record['question']}\nA: Let's think step by step."]

    def paper_prompts(self, record: Record) -> list[str]:
        """The published prompt. The hint ends with its line break, as in the published script."""
        hint = record["answer"].split("#### ")[0]
        return [f"Q: {record['question']} A:Let's think step by step. {hint} {_BEFORE_ANSWER}"]

    def gold(self, record: Record) -> Decimal:
        """The number after ``####``."""
        _, marks, result = record["answer"].rpartition("####")
        number = last_number(result)
        if not marks or number is None:
            raise ValueError(f"{record['answer'][-40:]!r} does not end with #### and a number.")
        return number

    def paper(self, record: Record, texts: Sequence[str]) -> float:
        """Whether the gold number's text occurs in what was written before the prompt's last words come again."""
        return float(record["answer"].rpartition("####")[2].strip() in texts[0].split(_BEFORE_ANSWER)[0])

    def parse(self, record: Record, texts: Sequence[str]) -> Decimal | None:
        """The last number."""
        return last_number(texts[0])

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """Equality as numbers: 18, 18.00 and $18 are the same."""
        return {"exact": float(answer == self.gold(record))}

    def solution(self, record: Record) -> list[str]:
        """The gold solution, without the marks of its calculator."""
        text = re.sub(r"<<.*?>>", "", record["answer"]).strip()
        return [text.replace("\n####", "\nThe answer is")]
