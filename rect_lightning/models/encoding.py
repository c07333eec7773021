"""Text to token ids, with the two places that editing asks for: the subject's last token and the target's tokens.

Both are found by character offsets in one tokenisation of the whole text. Counting the tokens of pieces instead goes
wrong wherever a tokenizer adds a BOS token, puts a space of its own first, or merges across the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: All token ids, special tokens first where the tokenizer adds them.
        target: Index of the target's first token; ``len(ids)`` where there is no target.
        subject: Index of the subject's last token, -1 where no subject was asked for.
    """

    ids: tuple[int, ...]
    target: int
    subject: int = -1

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.ids[self.target :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    subject_ends: Sequence[int] | None = None,
) -> list[Row]:
    """Tokenise prompts, each followed by a space and its target where targets are given.

    Args:
        tokenizer: A fast tokenizer.
        prompts: The texts before the target.
        targets: As many targets, without a leading space.
        subject_ends: For each prompt the character position right after its subject.

    Raises:
        ValueError: A subject or a target has no token of its own.
    """
    texts = list(prompts) if targets is None else [f"{p} {t}" for p, t in zip(prompts, targets, strict=True)]
    if not texts:
        return []
    batch = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    rows = []
    for i, (ids, offsets) in enumerate(zip(batch["input_ids"], batch["offset_mapping"], strict=True)):
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
            ids, offsets = ids[:-1], offsets[:-1]  # some tokenizers end every text; an edit goes on after it
        target = len(ids)
        if targets is not None:
            target = next((j for j, (_, end) in enumerate(offsets) if end > len(prompts[i])), len(ids))
            if target == len(ids):
                raise ValueError(f"The target {targets[i]!r} has no token of its own after {prompts[i]!r}.")
        subject = -1
        if subject_ends is not None:
            # the last one, since a byte-level tokenizer may need several tokens for one character
            covering = [j for j, (start, end) in enumerate(offsets) if start < subject_ends[i] <= end]
            if not covering:
                raise ValueError(
                    f"No token of {texts[i]!r} covers the end of its subject (character {subject_ends[i]})."
                )
            subject = covering[-1]
        rows.append(Row(ids=tuple(ids), target=target, subject=subject))
    return rows
