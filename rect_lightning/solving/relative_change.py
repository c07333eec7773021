"""RECT's definition: the relative change of a weight, and the entries where it is largest.

Gu et al., "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue" (EMNLP 2024,
arXiv 2401.04700), section 6:

    δ_ij = |ΔW_ij| / |W_ij|            keep ΔW_ij where δ_ij is in the matrix's top k %, else 0

Public implementations differ in details that the paper leaves open. The authors' code masks one editor's update and zeroes
a fixed 80 %; AlphaEdit's baseline (arXiv 2410.02355) takes the threshold of ``|ΔW / (W + 1e-8)|`` by ``kthvalue`` and keeps
one entry more. Here exactly ``round(k N)`` entries are kept, unscaled, ties broken by position, and W is the weight just
before the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 20
"""Up to this many entries a library's own selection is fast enough."""
_SAMPLE = 1 << 17
"""Entries of the sample that brackets the threshold of a larger matrix."""


def relative_change(update: Tensor, weight: Tensor) -> Tensor:
    """δ = |ΔW| / |W|, element-wise, in the update's shape and dtype.

    A change of a zero weight counts as infinitely large, no change of it as none.
    """
    return (update / weight).abs_().nan_to_num_(nan=0.0, posinf=torch.inf)


def largest(delta: Tensor, keep: float) -> Tensor:
    """A mask of the ``round(keep · N)`` largest entries; among equal ones those that come first in memory order.

    Exact at any size, with working memory of about two bytes an entry besides the mask. (Counting is by ``count_nonzero``:
    ``sum`` of a bool tensor makes a copy of eight bytes an entry first.)

    Args:
        delta: Any shape, non-negative, without nan.
        keep: The share to keep, from 0 to 1.

    Returns:
        A bool tensor in the shape of ``delta``.
    """
    flat = delta.reshape(-1)
    count = round(keep * flat.numel())
    if count == 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    threshold = _kth_largest(flat, count)
    mask = flat >= threshold
    surplus = int(mask.count_nonzero()) - count
    if surplus:  # of the entries at the threshold, drop those that come last
        mask[(flat == threshold).nonzero()[-surplus:, 0]] = False
    return mask.view(delta.shape)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest entry.

    A sorted sample brackets it, so that two passes at the speed of memory leave a few per cent of the entries to select
    from (Floyd and Rivest 1975). A bracket that misses is widened.
    """
    n = flat.numel()
    if n <= _SMALL:
        return flat.kthvalue(n - k + 1).values
    sample = flat[:: n // _SAMPLE].sort(descending=True).values
    m = sample.numel()
    rank = k / n * m
    margin = 4 * (m**0.5) / 2  # four standard deviations of the rank, at most
    while True:
        low_rank, high_rank = int(rank + margin) + 1, int(rank - margin) - 1
        high = sample[high_rank] if high_rank >= 0 else flat.new_tensor(torch.inf)
        low = sample[low_rank] if low_rank < m else flat.new_tensor(-torch.inf)
        above = int((flat > high).count_nonzero())
        between = flat[(flat >= low) & (flat <= high)]
        if 0 < k - above <= between.numel():
            return between.kthvalue(between.numel() - (k - above) + 1).values
        margin *= 4


def change_statistics(update: Tensor, delta: Tensor, thresholds: list[float]) -> dict[str, float]:
    """What the paper's statistics table shows of a change.

    Args:
        update: ``ΔW``.
        delta: Its `relative_change`.
        thresholds: Values of δ.

    Returns:
        ``manhattan``: sum of |ΔW|; ``above_<t>``: the share of entries with δ > t, for each threshold.
    """
    shares = {f"above_{t:g}": int((delta > t).count_nonzero()) / delta.numel() for t in thresholds}
    # row by row, then in fp64: one fp32 sum over a large matrix is off by tens of per cent
    manhattan = torch.linalg.vector_norm(update, 1, dim=-1).cpu().double().sum()
    return {"manhattan": float(manhattan), **shares}
