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

from collections.abc import Callable, Iterable, Iterator, Sequence

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

    Exact at any size, with working memory of about two bytes an entry besides the mask, also where many entries are equal.
    (Counting is by ``count_nonzero``: ``sum`` of a bool tensor makes a copy of eight bytes an entry first.)

    Args:
        delta: Any shape, non-negative.
        keep: The share to keep, from 0 to 1.

    Returns:
        A bool tensor in the shape of ``delta``.

    Raises:
        ValueError: An entry is nan.
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

    Raises:
        ValueError: As `largest`.
    """

    def flat(i: int) -> Tensor:
        return delta(i).reshape(-1)

    every = range(len(sizes))
    count = round(keep * sum(sizes))
    if any(flat(i).sum().isnan() for i in every):
        raise ValueError(f"{sum(int(flat(i).isnan().count_nonzero()) for i in every)} of {sum(sizes)} entries are nan.")
    if count == 0:
        return [torch.zeros_like(flat(i), dtype=torch.bool) for i in every]
    for low, high in _brackets(flat, sizes, count):
        masks, between = [], []
        for i in every:
            entries = flat(i)
            masks.append(_compare(torch.gt, entries, high))
            # without those above; a comparison of bytes takes half the time of one of floats
            between.append(_compare(torch.ge, entries, low).logical_xor_(masks[i]))
        wanted, found = count - _count(masks), _count(between)
        if 0 < wanted <= found:
            break
    if found <= max(_SMALL, sum(sizes) // 16):
        _add_largest(masks, between, flat, wanted)
        return masks
    # many entries equal one end of the bracket, and the indices of as many would take more memory than the matrix
    del between
    for end in (high, None, low):
        if end is None:
            part = [_compare(torch.lt, flat(i), high).logical_and_(_compare(torch.gt, flat(i), low)) for i in every]
        else:
            part = [_compare(torch.eq, flat(i), end) for i in every]
        here = min(_count(part), wanted)
        if end is None and here == wanted:
            _add_largest(masks, part, flat, wanted)
        else:
            _add_first(masks, part, here)
        wanted -= here
        if not wanted:
            break
    return masks


def _count(masks: Iterable[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks)


def _add_first(masks: Sequence[Tensor], part: Sequence[Tensor], count: int) -> None:
    """Add to the masks those entries of a part that come first, so many."""
    for mask, chosen in zip(masks, part, strict=True):
        for into, piece in zip(mask.split(_SMALL), chosen.split(_SMALL), strict=True):
            here = int(piece.count_nonzero())
            if here > count:
                piece[piece.nonzero()[count:, 0]] = False
            into |= piece
            count -= min(here, count)


def _add_largest(masks: Sequence[Tensor], part: Sequence[Tensor], flat: Callable[[int], Tensor], count: int) -> None:
    """Add to the masks the largest entries of a part, so many, by their indices."""
    places = [chosen.nonzero()[:, 0] for chosen in part]
    values = [flat(i)[index] for i, index in enumerate(places)]
    every = _join(values)
    threshold = every.kthvalue(every.numel() - count + 1).values
    surplus = int((every >= threshold).count_nonzero()) - count
    for i in reversed(range(len(masks))):
        kept = _compare(torch.ge, values[i], threshold)
        if surplus:  # of the entries at the threshold, drop those that come last
            last = _compare(torch.eq, values[i], threshold).nonzero()[-surplus:, 0]
            kept[last] = False
            surplus -= last.numel()
        masks[i][places[i]] = kept


def _brackets(flat: Callable[[int], Tensor], sizes: Sequence[int], k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of values with the k-th largest entry between them, or on one of them: likely in the first, surely in the last.

    They come from a sorted sample (Floyd and Rivest 1975). So few passes at the speed of memory leave a per cent of the
    entries to select from.
    """
    n, some = sum(sizes), flat(0)
    if n > _SMALL:
        stride = n // _SAMPLE | 1  # odd, so that it does not walk along the same few columns of a matrix
        starts = [-sum(sizes[:i]) % stride for i in range(len(sizes))]  # every stride-th entry of them all, in a row
        sample = _join(flat(i)[start::stride] for i, start in enumerate(starts)).sort(descending=True).values
        m = sample.numel()
        rank = k / n * m
        margin = 4 * (m**0.5) / 2  # four standard deviations of the rank, at most
        while margin < m:
            low, high = int(rank + margin) + 1, int(rank - margin) - 1
            yield (
                sample[low] if low < m else sample.new_tensor(-torch.inf),
                sample[high] if high >= 0 else sample.new_tensor(torch.inf),
            )
            margin *= 4
    yield some.new_tensor(-torch.inf), some.new_tensor(torch.inf)


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
