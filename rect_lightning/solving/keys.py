"""What the model makes of a subject: keys, values and the residual stream at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad
from rect_lightning.solving.blocks import ending_at, first


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectStates:
    """A layer's activations at the last token of each row's subject, fp32.

    Attributes:
        key: Input of the down projection, ``[rows, inner width]``.
        value: Output of the down projection, ``[rows, width]``.
        stream: Output of the block, ``[rows, width]``.
    """

    key: Tensor
    value: Tensor
    stream: Tensor


@torch.no_grad()
def subject_states(
    adapter: Adapter, rows: Sequence[Row], layer: int, *, budget: int = 1024, show_progress: bool = False
) -> SubjectStates:
    """Run rows up to a layer and read it at the subject's last token.

    Tokens after the subject cannot matter to it and are left out. The weights are read as they stand.

    Args:
        adapter: The model.
        rows: Tokenised texts whose ``subject`` is set.
        layer: The layer to read.
        budget: Padded tokens in one forward pass. More needs more memory, and was slower on a CPU.
        show_progress: Whether to show a bar.
    """
    captured: dict[str, Tensor] = {}

    def keep_projection(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        captured["key"], captured["value"] = args[0], output

    def keep_stream(_module: nn.Module, _args: Any, output: Any) -> None:
        captured["stream"] = first(output)

    block = adapter.blocks[layer]
    handles = [
        adapter.projection(layer).register_forward_hook(keep_projection),
        block.register_forward_hook(keep_stream),
    ]
    found: dict[str, list[Tensor]] = {"key": [], "value": [], "stream": []}
    order: list[int] = []
    batches = by_length([row.subject + 1 for row in rows], budget)
    try:
        for indices in track(batches, f"keys of layer {layer}", show=show_progress, unit="batch"):
            lasts = [rows[i].subject for i in indices]
            batch = pad([rows[i].ids[: last + 1] for i, last in zip(indices, lasts, strict=True)], adapter.device)
            with ending_at(block):
                adapter.backbone(**batch.inputs(), use_cache=False)
            for name, states in captured.items():
                found[name].append(states[torch.arange(len(indices)), lasts].float())
            order += indices
    finally:
        for handle in handles:
            handle.remove()
    back = torch.tensor(order).argsort()
    return SubjectStates(**{name: torch.cat(parts)[back] for name, parts in found.items()})
