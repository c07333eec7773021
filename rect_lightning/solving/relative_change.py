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

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_SMALL = 1 << 20
"""Up to this many entries a library's own selection is fast enough."""
_SAMPLE = 1 << 17
"""Entries of the sample that brackets the threshold of a larger matrix."""


def relative_change(update: Tensor, weight: Tensor) -> Tensor:
    """δ = |ΔW| / |W|, element-wise, in the update's shape and in at least fp32.

    A change of a zero weight counts as infinitely large, no change of it as none. A change that is nan stays nan.
    """
    update = update.to(torch.promote_types(update.dtype, torch.float32))
    delta = (update / weight).abs_()
    if delta.sum().isnan():  # rare, and a sum is quick
        delta.masked_fill_(update == 0, 0)
    return delta


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
    return largest_of_all(lambda _: delta, [delta.numel()], keep)[0].view(delta.shape)


def largest_of_all(delta: Callable[[int], Tensor], sizes: Sequence[int], keep: float) -> list[Tensor]:
    """As `largest`, with one threshold over several tensors, which need not be in memory together.

    Args:
        delta: Gives the i-th tensor, each time the same; called a few times for each.
        sizes: The tensors' numbers of entries.
        keep: The share of the sum of the sizes to keep.

    Returns:
        Flat bool tensors, on the tensors' own devices.
    """

    def flat(i: int) -> Tensor:
        return delta(i).reshape(-1)

    count = round(keep * sum(sizes))
    if count == 0:
        return [torch.zeros_like(flat(i), dtype=torch.bool) for i in range(len(sizes))]
    threshold = _kth_largest(flat, sizes, count)
    masks = [_compare(torch.ge, flat(i), threshold) for i in range(len(sizes))]
    surplus = sum(int(mask.count_nonzero()) for mask in masks) - count
    for i in reversed(range(len(sizes))):
        if not surplus:
            break
        # of the entries at the threshold, drop those that come last
        last = _compare(torch.eq, flat(i), threshold).nonzero()[-surplus:, 0]
        masks[i][last] = False
        surplus -= last.numel()
    return masks


def _kth_largest(flat: Callable[[int], Tensor], sizes: Sequence[int], k: int) -> Tensor:
    """The k-th largest entry.

    A sorted sample brackets it, so that two passes at the speed of memory leave a few per cent of the entries to select
    from (Floyd and Rivest 1975). A bracket that misses is widened.
    """
    n = sum(sizes)
    if n <= _SMALL:
        every = _join(flat(i) for i in range(len(sizes)))
        return every.kthvalue(n - k + 1).values
    stride = n // _SAMPLE
    starts = [-sum(sizes[:i]) % stride for i in range(len(sizes))]  # every stride-th entry of them all, in a row
    sample = _join(flat(i)[start::stride] for i, start in enumerate(starts)).sort(descending=True).values
    m = sample.numel()
    rank = k / n * m
    margin = 4 * (m**0.5) / 2  # four standard deviations of the rank, at most
    while True:
        low_rank, high_rank = int(rank + margin) + 1, int(rank - margin) - 1
        high = sample[high_rank] if high_rank >= 0 else sample.new_tensor(torch.inf)
        low = sample[low_rank] if low_rank < m else sample.new_tensor(-torch.inf)
        above, between = 0, []
        for i in range(len(sizes)):
            entries = flat(i)
            above += int(_compare(torch.gt, entries, high).count_nonzero())
            between.append(entries[_compare(torch.ge, entries, low) & _compare(torch.le, entries, high)])
        inside = _join(between)
        if 0 < k - above <= inside.numel():
            return inside.kthvalue(inside.numel() - (k - above) + 1).values
        margin *= 4


def _join(parts: Iterable[Tensor]) -> Tensor:
    """One tensor, on the device of the first part and in the widest dtype; of a single part no copy."""
    first, *others = parts
    return torch.cat([first, *(part.to(first.device) for part in others)]) if others else first


def _compare(how: Callable[[Tensor, Tensor], Tensor], flat: Tensor, threshold: Tensor) -> Tensor:
    """Entries against a threshold, which may be of a wider dtype and on another device."""
    return how(flat.to(threshold.dtype), threshold.to(flat.device))


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
    wide = torch.promote_types(update.dtype, torch.float32)
    # row by row, then in fp64: one fp32 sum over a large matrix is off by tens of per cent
    manhattan = torch.linalg.vector_norm(update, 1, dim=-1, dtype=wide).cpu().double().sum()
    return {"manhattan": float(manhattan), **shares}
