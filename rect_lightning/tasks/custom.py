"""Tasks of your own, said in a few lines of YAML: a prompt with columns in braces, and where the answer stands."""

# No `from __future__ import annotations`: the command line reads the types of the constructors.

from collections.abc import Sequence
from string import Formatter
from typing import Any, Literal

from rect_lightning.tasks.choice import Choice, label
from rect_lightning.tasks.scores import exact, f1, last_number, rouge
from rect_lightning.tasks.task import Part, PromptTask, Record


def _columns(template: str) -> list[str]:
    """The columns that a template names."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


class MultipleChoice(Choice):
    """Records with one right option; scored by the likeliest option and by what the model writes.

    Args:
        name: The task's name, which begins the names of its scores.
        path: A .json, .jsonl or .csv file, or a hub data set.
        prompt: The prompt, with columns in braces: ``{question} Yes or no? Answer:``. The answer follows after a space.
        options: The options, or the name of the column that lists them.
        answer: The column of the right option: its text, or its place counted from 0.
        config: The hub data set's configuration.
        split: The hub data set's split.
        shots: Show so many solved records before each prompt; the first ones, which are then not asked.
        max_new_tokens: The longest text to read an option from, in tokens.

    Raises:
        ValueError: There are fewer than two options, or a number is out of range.
    """

    def __init__(
        self,
        *,
        name: str,
        path: str,
        prompt: str,
        options: list[str] | str,
        answer: str = "answer",
        config: str | None = None,
        split: str | None = None,
        shots: int = 0,
        max_new_tokens: int = 8,
    ) -> None:
        if not isinstance(options, str) and len(options) < 2:
            raise ValueError(f"{name}: options must be at least two, or the name of a column.")
        self.name, self.prompt, self.choices, self.answer = name, prompt, options, answer
        self.columns = dict.fromkeys([*_columns(prompt), answer], object)
        if isinstance(options, str):
            self.columns[options] = list
        super().__init__(path=path, config=config, split=split, shots=shots, max_new_tokens=max_new_tokens)

    def prompts(self, record: Record) -> list[str]:
        """The template, filled in."""
        return [self.prompt.format_map(record)]

    def options(self, record: Record) -> Sequence[str]:
        """The options."""
        return record[self.choices] if isinstance(self.choices, str) else self.choices

    def gold(self, record: Record) -> int:
        """The place of the right option."""
        return label(record[self.answer], self.options(record))


class Generation(PromptTask):
    """Records with an answer in words; scored by what the model writes.

    Args:
        name: The task's name, which begins the names of its scores.
        path: A .json, .jsonl or .csv file, or a hub data set.
        prompt: The prompt, with columns in braces: ``Q: {question} A:``. The answer follows after a space.
        answer: The column of the answer, or of a list of answers of which each is right.
        rule: How texts are compared: words gives exact match and F1 of normalised words, as in SQuAD; number the equality of
            the last number; rouge ROUGE-1, -2 and -L.
        stop: What ends an answer; leading white space does not.
        config: The hub data set's configuration.
        split: The hub data set's split.
        shots: Show so many solved records before each prompt; the first ones, which are then not asked.
        max_new_tokens: The longest answer, in tokens.
    """

    def __init__(
        self,
        *,
        name: str,
        path: str,
        prompt: str,
        answer: str = "answer",
        rule: Literal["words", "number", "rouge"] = "words",
        stop: tuple[str, ...] = ("\n",),
        config: str | None = None,
        split: str | None = None,
        shots: int = 0,
        max_new_tokens: int = 20,
    ) -> None:
        self.name, self.prompt, self.answer, self.rule = name, prompt, answer, rule
        self.stop = tuple(stop)
        self.main = "rougeL" if rule == "rouge" else "exact"
        self.columns = dict.fromkeys([*_columns(prompt), answer], object)
        super().__init__(path=path, config=config, split=split, shots=shots, max_new_tokens=max_new_tokens)

    def prompts(self, record: Record) -> list[str]:
        """The template, filled in."""
        return [self.prompt.format_map(record)]

    def gold(self, record: Record) -> list[str]:
        """The answers."""
        value = record[self.answer]
        answers = [str(item) for item in (value if isinstance(value, list) else [value]) if str(item).strip()]
        if not answers:
            raise ValueError(f"{self.answer} is empty.")
        if self.rule == "number" and last_number(answers[0]) is None:
            raise ValueError(f"{self.answer} is {answers[0]!r:.40}, without a number.")
        return answers

    def parse(self, record: Record, texts: Sequence[str]) -> Any:
        """The number, or the text; None without one."""
        return last_number(texts[0]) if self.rule == "number" else texts[0] or None

    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """By the rule."""
        gold = self.gold(record)
        if self.rule == "number":
            return {"exact": float(answer is not None and answer in [last_number(text) for text in gold])}
        if self.rule == "rouge":
            return dict(rouge(answer or "", gold[0]))
        return {"exact": exact(answer or "", gold), "f1": f1(answer or "", gold)}

    def solution(self, record: Record) -> list[str]:
        """The first answer."""
        return self.gold(record)[:1]
