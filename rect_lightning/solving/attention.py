"""Attention as two batched products over groups of heads: for the few columns of a value search the fastest way.

A fused kernel is made for many columns, above all its backward pass, and transformers' own plain attention copies keys and
values for each head that shares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter

_NAME = "rect_lightning_grouped"


@contextmanager
def plain_attention(adapter: Adapter) -> Iterator[None]:
    """Inside, the model's attention is `grouped_attention`, where its family lets that be chosen."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, grouped_attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    config = adapter.model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, without dropout; the mask tells of sliding windows.

    On a CPU its arithmetic is in fp32 at least: products in bf16 would take two thirds of the time, but for each of their
    shapes oneDNN generates code, more than half a megabyte, and keeps it.

    Args:
        module: The layer; not needed.
        query: ``[rows, heads, columns, size]``.
        key: ``[rows, groups, all columns, size]``; a group of consecutive heads shares its keys and values.
        value: As the keys.
        attention_mask: What is added to the scores, ``[rows or 1, 1, columns, all columns]``.
        scaling: What scores are multiplied with; the size to the power of -1/2 if not given.
        softcap: Scores are squashed into this range by a hyperbolic tangent.

    Returns:
        ``[rows, columns, heads, size]`` in the query's dtype; and no weights.
    """
    rows, heads, columns, size = query.shape
    groups, dtype = key.shape[1], query.dtype
    if query.device.type == "cpu":
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    scores = query.reshape(rows, groups, -1, size) @ key.transpose(2, 3)
    scores = scores.view(rows, heads, columns, -1) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    found = weights.view(rows, groups, -1, weights.shape[-1]) @ value
    return found.view(rows, heads, columns, size).transpose(1, 2).to(dtype), None
