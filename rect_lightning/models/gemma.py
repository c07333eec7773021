"""Gemma 2 and 3, which normalise the MLP's output before it joins the residual stream."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter


class Gemma(Adapter):
    """Gemma 2 and the text models of Gemma 3.

    A block adds ``N(v)`` to the residual stream, where ``v`` is the down projection's output and ``N`` an RMSNorm. An
    editor writes to ``v``, so a change wanted in the stream has to be taken back through ``N``.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma2", "gemma3_text")
    blocks_path = "model.layers"
    projection_path = "mlp.down_proj"
    norm_path = "model.norm"
    writes_to_stream = False

    def _post_norm(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule("post_feedforward_layernorm")

    def stream_change(self, layer: int, value: Tensor, change: Tensor) -> Tensor:
        """``N(value + change) - N(value)``."""
        norm = self._post_norm(layer)
        return norm(value + change) - norm(value)

    def value_change(self, layer: int, value: Tensor, change: Tensor) -> Tensor:
        """The change of ``value`` after which ``N`` points where ``N(value) + change`` does.

        ``N(v) = v / rms(v) * g`` has a fixed size, so only the direction can be met; the size of ``value`` is kept.
        """
        norm = self._post_norm(layer)
        gain = norm(torch.ones_like(value))  # rms(1) = 1, so this reads the gain whatever way the norm stores it
        # a channel with hardly any gain cannot carry the change, and must not take it over
        floor = 1e-3 * gain.abs().mean(-1, keepdim=True)
        wanted = (norm(value) + change) / torch.where(gain.abs() < floor, floor.copysign(gain), gain)
        return wanted * _rms(value) / _rms(wanted) - value

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Logits with Gemma 2's soft cap."""
        logits = super().logits(hidden, head)
        cap = self.model.config.get_text_config().final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


class Gemma3Multimodal(Gemma):
    """The text part of the Gemma 3 checkpoints that also read images (4B and larger)."""

    model_types = ("gemma3",)
    blocks_path = "model.language_model.layers"
    norm_path = "model.language_model.norm"
