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


def pad(
    rows: Sequence[Sequence[int]],
    device: torch.device,
    *,
    anchors: Sequence[int] | None = None,
) -> Batch:
    """Stack rows so that their anchors share a column; without anchors all rows start in the first column.

    Args:
        rows: Token ids.
        device: Where to put them.
        anchors: For each row the index of one of its tokens.
    """
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


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped into as few batches of similar length as ``budget`` padded tokens each allow, longest first.

    Longest first, so that what does not fit in memory fails at once and not at the end. A row longer than the budget
    gets a batch of its own.

    Raises:
        ValueError: The budget is not positive.
    """
    _check(budget)
    batches: list[list[int]] = []
    for index in _longest_first(lengths):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def by_time(lengths: Sequence[int], budget: int, *, overhead: int, most: int | None = None) -> list[list[int]]:
    """Indices grouped into the batches that take the least time together, longest first, each within the budget.

    A batch's time is that of its padded tokens and of ``overhead`` more, which stand for reading the weights. So many
    rows fall into batches of like length with little padding, and a few rows into one. None has more rows than ``most``.

    Raises:
        ValueError: The budget is not positive.
    """
    _check(budget)
    order = _longest_first(lengths)
    time = [0.0] + [float("inf")] * len(order)  # of the first rows, cut in the best way
    cut = [0] * (len(order) + 1)  # where the last batch of that way begins
    for start, index in enumerate(order):
        longest = max(1, lengths[index])
        fit = max(1, min(budget // longest, len(order) - start, most or len(order)))
        for end in range(start + 1, start + fit + 1):
            candidate = time[start] + overhead + (end - start) * longest
            if candidate < time[end]:
                time[end], cut[end] = candidate, start
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]


def padded(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """The tokens of batches of rows of these lengths, padding included."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def _check(budget: int) -> None:
    if budget < 1:
        raise ValueError(f"A batch needs a budget of at least one token, got {budget}.")


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])
