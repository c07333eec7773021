"""Answers as a user gets them: asked in an instruction, written freely and scored as a whole.

After Yang et al. 2025, "The Mirage of Model Editing: Revisiting Evaluation in the Wild" (arXiv 2502.11177): teacher forcing
tells the model how an answer goes on and how long it is, which flatters an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rect_lightning.metrics.forward import check_lengths
from rect_lightning.metrics.generation import (
    begins_with,
    continuations,
    continued_text,
    normalised_words,
    stopping,
    up_to_stop,
)
from rect_lightning.models.encoding import encode

if TYPE_CHECKING:
    from rect_lightning.models import Adapter


@dataclass(frozen=True, kw_only=True)
class Wild:
    """How a model is asked; context and stops by default as in the paper's public code.

    Raises:
        ValueError: The context does not hold ``{}`` once, a stop is empty, or no token may be written.
    """

    context: str = "Please answer the question:\n\nQ: {}\nA:"
    """What the model reads, with ``{}`` in place of the prompt; a chat model's own template with its special tokens works."""
    stops: tuple[str, ...] = (".", "\n")
    """Strings that end an answer, besides the model's end-of-text token; leading white space does not."""
    max_new_tokens: int = 40
    """The longest answer, in tokens."""

    def __post_init__(self) -> None:
        if self.context.count("{}") != 1:
            raise ValueError(f"wild.context must hold '{{}}' once, in place of the prompt; got {self.context!r}.")
        object.__setattr__(self, "stops", tuple(self.stops))
        if not all(self.stops):
            raise ValueError(f"wild.stops must not be empty strings; got {list(self.stops)}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"wild.max_new_tokens must be at least 1; got {self.max_new_tokens}.")

    def ask(self, prompt: str) -> str:
        """What the model reads for a prompt."""
        return self.context.replace("{}", prompt)


@dataclass(frozen=True, slots=True)
class FreeAnswer:
    """What a model answered by itself.

    Attributes:
        text: The answer, up to where it stopped.
        target: What it should be.
    """

    text: str
    target: str

    @property
    def exact(self) -> bool:
        """Whether the answer is the target and nothing else, both normalised as in SQuAD (Rajpurkar et al. 2016)."""
        return normalised_words(self.text) == normalised_words(self.target)

    @property
    def begins(self) -> bool:
        """Whether the answer begins with the target's words."""
        return begins_with(self.text, self.target)


def free_answers(
    adapter: Adapter, prompts: Sequence[str], targets: Sequence[str], wild: Wild, *, show_progress: bool = False
) -> list[FreeAnswer]:
    """Let the model answer each prompt greedily and freely.

    Raises:
        ValueError: A prompt is too long for the model's context; raised before the model runs.
    """
    written = continuations(
        adapter,
        [wild.ask(prompt) for prompt in prompts],
        max_new_tokens=wild.max_new_tokens,
        finished=stopping(adapter, wild.stops),
        show_progress=show_progress,
    )
    return [
        FreeAnswer(up_to_stop(continued_text(adapter, answer), wild.stops), target)
        for answer, target in zip(written, targets, strict=True)
    ]


def check_free(adapter: Adapter, prompts: Sequence[str], targets: Sequence[str], wild: Wild) -> None:
    """Refuse what `free_answers` could not measure, and warn of targets that hold a stop.

    Raises:
        ValueError: A prompt is too long for the model's context, or a target for the answer.
    """
    asked = [wild.ask(prompt) for prompt in prompts]
    rows = encode(adapter.tokenizer, asked, targets)
    check_lengths(adapter, [row.target + wild.max_new_tokens for row in rows], asked)
    for row, target in zip(rows, targets, strict=True):
        if len(row.target_ids) > wild.max_new_tokens:
            raise ValueError(
                f"The target {target!r} has {len(row.target_ids)} tokens, more than an answer may have: raise "
                f"wild.max_new_tokens, now {wild.max_new_tokens}."
            )
    cut = sorted({target for target in targets if not FreeAnswer(up_to_stop(target, wild.stops), target).exact})
    if cut:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(
            f"An answer ends at the first of {list(wild.stops)}, so {len(cut)} targets cannot be answered in full, such as "
            f"{cut[0]!r}: set wild.stops."
        )
