"""What one edit asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PLACEHOLDER = "{}"
_LISTED = 5  # of many findings of one kind, a message lists so many


class RequestError(ValueError):
    """An edit request that cannot be used.

    Args:
        problem: What is wrong and what to do about it.
        field: The field at fault.
        where: The file and line, or the data set and record.
    """

    def __init__(self, problem: str, *, field: str | None = None, where: str | None = None) -> None:
        super().__init__(": ".join(part for part in (where, field, problem) if part))
        self.problem = problem
        self.field = field
        self.where = where


def listed(findings: Iterable[str], header: str) -> str:
    """A message with the first few findings of one kind, a line each, and the number of those left out."""
    findings = list(findings)
    more = [f"and {len(findings) - _LISTED} more"] if len(findings) > _LISTED else []
    return "\n  ".join([f"{header}:", *findings[:_LISTED], *more])


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A prompt about something else, whose answer the edit must leave as it is.

    Raises:
        RequestError: If the prompt or the answer is blank.
    """

    prompt: str
    """A whole prompt that ends right before the answer."""
    answer: str
    """The right answer; surrounding whitespace is stripped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", self.answer.strip())
        object.__setattr__(self, "prompt", self.prompt.rstrip())
        if not self.prompt.strip():
            raise RequestError(
                "a neighbour's prompt is empty; give it one or leave the neighbour out", field="neighbours"
            )
        if not self.answer:
            raise RequestError(
                f"the neighbour {self.prompt!r} has no answer; give it one or leave the neighbour out",
                field="neighbours",
            )


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to change: after the edit the model continues `text` with `target_new`.

    Raises:
        RequestError: If the subject is blank, the prompt does not hold ``{}`` exactly once, a target is blank, or the
            two targets are the same.
    """

    id: str
    """Names the request in results and messages."""
    subject: str
    """What the fact is about."""
    prompt: str
    """A prompt that ends right before the target, with ``{}`` once, in place of the subject."""
    target_new: str
    """What the edited model shall say; surrounding whitespace is stripped."""
    target_true: str | None = None
    """What the model is to say no longer, where known; surrounding whitespace is stripped."""
    paraphrases: tuple[str, ...] = ()
    """The same question in other words, whole prompts: they measure generalisation."""
    neighbours: tuple[Neighbour, ...] = ()
    """Prompts about something else: they measure locality."""
    generation_prompts: tuple[str, ...] = ()
    """Open-ended prompts about the subject: they measure fluency and consistency."""
    relation: str | None = None
    """The relation between subject and target, such as Wikidata's P103."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_new", self.target_new.strip())
        object.__setattr__(self, "prompt", self.prompt.rstrip())  # a target brings its own space
        object.__setattr__(self, "paraphrases", tuple(prompt.rstrip() for prompt in self.paraphrases))
        object.__setattr__(self, "neighbours", tuple(self.neighbours))
        object.__setattr__(self, "generation_prompts", tuple(self.generation_prompts))
        if not self.subject.strip():
            raise RequestError("empty; say what the fact is about", field="subject")
        if (count := self.prompt.count(PLACEHOLDER)) != 1:
            raise RequestError(
                f"must hold {PLACEHOLDER} once, in place of the subject, but {self.prompt!r} holds it {count} times",
                field="prompt",
            )
        if not self.target_new:
            raise RequestError("empty; say what the edited model shall answer", field="target_new")
        if self.target_true is None:
            return
        object.__setattr__(self, "target_true", self.target_true.strip())
        if not self.target_true:
            raise RequestError("empty; leave it out if it is not known", field="target_true")
        if self.target_new == self.target_true:
            raise RequestError(
                f"{self.target_new!r} is also the true target, so there is nothing to edit; change or remove one",
                field="target_new",
            )

    @property
    def text(self) -> str:
        """The prompt with the subject in place."""
        # Not str.format: a prompt may hold other braces.
        return self.prompt.replace(PLACEHOLDER, self.subject)

    def to(self, *_: object, **__: object) -> EditRequest:
        """The request itself, which holds no tensors: so that a Trainer can move a batch to a device."""
        return self
