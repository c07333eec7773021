"""Token rows of different lengths as rectangular batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded token rows, as keyword arguments of a model's backbone.

    Attributes:
        input_ids: ``[rows, columns]`` int64; what stands at a padded place does not matter.
        attention_mask: ``[rows, columns]`` int64, one at real tokens.
        position_ids: ``[rows, columns]`` int64, counted from each row's first real token.
        starts: ``[rows]`` int64, the column of each row's first real token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    starts: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the backbone."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


def pad(rows: Sequence[Sequence[int]], device: torch.device, *, anchors: Sequence[int] | None = None) -> Batch:
    """Stack rows so that their anchors share a column; without anchors all rows start in the first column."""
    anchors = [0] * len(rows) if anchors is None else anchors
    column = max(anchors)
    starts = torch.tensor([column - anchor for anchor in anchors])
    ends = starts + torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(ends.max()))
    mask = (columns >= starts[:, None]) & (columns < ends[:, None])
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    positions = (columns - starts[:, None]).clamp(min=0)
    return Batch(
        input_ids=ids.to(device),
        attention_mask=mask.long().to(device),
        position_ids=positions.to(device),
        starts=starts.to(device),
    )


def by_length(lengths: Sequence[int], budget: int, *, padding: float = 1.0) -> list[list[int]]:
    """Indices grouped into batches of similar length, longest first, each at most ``budget`` padded tokens.

    Longest first, so that what does not fit in memory fails at once and not at the end. A row longer than the budget
    gets a batch of its own.

    Args:
        lengths: Tokens of each row.
        budget: Padded tokens of a batch.
        padding: The largest share of a batch that may be padding.

    Raises:
        ValueError: The budget is not positive.
    """
    if budget < 1:
        raise ValueError(f"A batch needs a budget of at least one token, got {budget}.")
    batches: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if padded <= budget and real + lengths[index] >= (1 - padding) * padded:
                batches[-1].append(index)
                real += lengths[index]
                continue
        batches.append([index])
        real = lengths[index]
    return batches
