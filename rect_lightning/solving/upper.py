"""The part of a model that editing some layers can change: all that follows the lowest one's down projection.

What comes before does not depend on the edits, however often they are tried out, and so runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad
from rect_lightning.solving.blocks import Call, first, run_to, without_cache

Change = Callable[[Tensor], Tensor]
"""What a down projection gives in addition, ``[rows, columns, out]``, for its input, ``[rows, columns, in]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lower:
    """A batch of rows, padded on the right, run up to and including a layer.

    Attributes:
        rows: Which of the rows that were asked for, in the order of the batch.
        layer: The layer.
        key: Input of its down projection, ``[rows, columns, inner width]``.
        value: Output of its down projection, ``[rows, columns, width]``.
        hidden: Output of its block, ``[rows, columns, width]``.
        calls: How to call the later blocks.
    """

    rows: list[int]
    layer: int
    key: Tensor
    value: Tensor
    hidden: Tensor
    calls: list[Call]


@torch.no_grad()
def run_lower(
    adapter: Adapter, rows: Sequence[Sequence[int]], layer: int, *, budget: int = 1024, show_progress: bool = False
) -> Iterator[Lower]:
    """Run token rows up to a layer, in batches of like length, each when it is asked for.

    So what needs each batch only once does not hold them all; what needs them again keeps them in a list.

    Args:
        adapter: The model.
        rows: Token ids.
        layer: The layer.
        budget: Padded tokens in one batch. More needs more memory, and was slower on a CPU.
        show_progress: Whether to show a bar over the batches.
    """
    batches = by_length([len(row) for row in rows], budget)
    for chosen in track(batches, "batches", show=show_progress, unit="batch"):
        keys: list[Tensor] = []
        handle = adapter.projection(layer).register_forward_hook(lambda _m, args, _o, keys=keys: keys.append(args[0]))
        try:
            trace = run_to(adapter, pad([rows[i] for i in chosen], adapter.device), layer)
        finally:
            handle.remove()
        calls = without_cache(trace.calls)
        yield Lower(rows=chosen, layer=layer, key=keys.pop(), value=trace.value, hidden=trace.hidden, calls=calls)


def run_upper(adapter: Adapter, lower: Lower, changes: Mapping[int, Change]) -> Tensor:
    """The normalised hidden states of a batch, ``[rows, columns, width]``, where down projections give more than they do.

    Differentiable with respect to whatever the changes are made of.

    Args:
        adapter: The model, with its weights as they were when the lower part was run.
        lower: The batch.
        changes: For layers from the lower part's on what to add.
    """
    hidden = lower.hidden
    if lower.layer in changes:
        change = changes[lower.layer](lower.key)
        hidden = hidden + adapter.stream_change(lower.layer, lower.value, change)
    with _added(adapter, {layer: change for layer, change in changes.items() if layer > lower.layer}):
        for block, call in zip(list(adapter.blocks)[lower.layer + 1 :], lower.calls, strict=True):
            hidden = first(block(hidden, *call.args, **call.kwargs))
    normalised: Tensor = adapter.norm(hidden)
    return normalised


@contextmanager
def _added(adapter: Adapter, changes: Mapping[int, Change]) -> Iterator[None]:
    def hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _module, args, output: output + change(args[0])

    handles = [adapter.projection(layer).register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
