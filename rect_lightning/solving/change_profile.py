"""How the relative changes of a weight's entries are distributed, small enough to be kept with a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rect_lightning.solving.relative_change import largest, relative_change
from rect_lightning.solving.spectrum import frobenius_norm

LOW, HIGH, BINS = -8.0, 4.0, 120
"""The bins of log10 δ: a tenth of a decade each."""
_CHUNK = 1 << 23
"""Entries at a time: histc counts in the dtype of its input, and fp32 counts exactly up to 2²⁴."""


@dataclass(frozen=True)
class ChangeProfile:
    """The distribution of ``δ = |ΔW / W|`` over a weight's entries, and the size of the change."""

    entries: int
    zero: int
    """Entries that did not change."""
    below: int
    """Entries that changed by less than the first bin's δ."""
    counts: list[int]
    """Entries in each of `BINS` equal bins of log10 δ from `LOW` to `HIGH`."""
    above: int
    """Entries that changed by more than the last bin's δ, such as zero weights."""
    thresholds: dict[str, float | None]
    """By the share kept: the smallest δ that RECT would keep of this change; none where it is infinite."""
    norm: float
    """Frobenius norm of the change."""
    weight_norm: float
    """Frobenius norm of the weight before it."""


def change_profile(update: Tensor, weight: Tensor, keeps: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)) -> ChangeProfile:
    """Count the relative changes of a weight's entries in bins.

    Args:
        update: ``ΔW``, without nan.
        weight: The weight before the change, in the same shape.
        keeps: Shares for whose top the smallest δ is wanted; the paper's by default.
    """
    delta = relative_change(update, weight).view(-1)
    smallest = {f"{keep:g}": smallest_kept(delta, largest(delta, keep)) for keep in keeps}
    counts = torch.zeros(BINS, dtype=torch.int64)
    zero = below = above = 0
    for part in delta.split(_CHUNK):
        logs = part.log10()
        zero += int((part == 0).count_nonzero())
        below += int(((logs < LOW) & (part > 0)).count_nonzero())
        above += int((logs > HIGH).count_nonzero())
        counts += torch.histc(logs, bins=BINS, min=LOW, max=HIGH).long().cpu()
    return ChangeProfile(
        entries=delta.numel(),
        zero=zero,
        below=below,
        counts=counts.tolist(),
        above=above,
        thresholds={keep: value if math.isfinite(value) else None for keep, value in smallest.items()},
        norm=frobenius_norm(update),
        weight_norm=frobenius_norm(weight),
    )


def smallest_kept(delta: Tensor, mask: Tensor) -> float:
    """The smallest δ in a mask, infinite where the mask is empty."""
    # part by part, since RECT may not take another copy of the matrix
    parts = zip(delta.reshape(-1).split(_CHUNK), mask.reshape(-1).split(_CHUNK), strict=True)
    return min((float(torch.where(kept, part, torch.inf).amin()) for part, kept in parts), default=math.inf)
