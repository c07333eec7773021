"""What an answer would change in MLPs: inputs and output gradients of down projections where its tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerGradients:
    """Down projections at the tokens from which an answer's tokens are predicted, fp32 on the CPU.

    Attributes:
        keys: Their inputs, ``[layers, tokens, inner width]``.
        gradients: The gradients of the answer's negative log-likelihood, summed over its tokens, with respect to their
            outputs, ``[layers, tokens, width]``.
        losses: The negative log-likelihood of each token in nats, ``[tokens]``.
    """

    keys: Tensor
    gradients: Tensor
    losses: Tensor


def answer_gradients(
    adapter: Adapter, rows: Sequence[Row], layers: Sequence[int], *, budget: int = 1024, show_progress: bool = False
) -> list[AnswerGradients]:
    """Run rows forwards and backwards, down to the first of the layers; no weight gets a gradient.

    Rows do not bear on each other, so how they are batched does not matter.

    Args:
        adapter: The model. The weights are read as they stand.
        rows: Tokenised texts whose ``target`` is set.
        layers: The layers to read, increasing.
        budget: Padded tokens in one pass. More needs more memory, and was slower on a CPU.
        show_progress: Whether to show a bar.

    Returns:
        One record a row, in the order given.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # a new tensor where the weight is frozen, so that the graph begins here in any case
        output = output if output.requires_grad else output.detach().requires_grad_()
        inputs.append(args[0].detach())
        outputs.append(output)
        return output

    found: dict[int, AnswerGradients] = {}
    batches = by_length([len(row.ids) - 1 for row in rows], budget)
    handles: list[Any] = [adapter.projection(layer).register_forward_hook(keep) for layer in layers]
    try:
        for indices in track(batches, "gradients", show=show_progress, unit="batch"):
            inputs.clear()
            outputs.clear()
            chosen = [rows[i] for i in indices]
            lengths = [len(row.target_ids) for row in chosen]
            where = torch.tensor(
                [(n, place) for n, row in enumerate(chosen) for place in range(row.target - 1, len(row.ids) - 1)]
            ).unbind(1)
            wanted = torch.tensor([token for row in chosen for token in row.target_ids])
            with torch.enable_grad():
                batch = pad([row.ids[:-1] for row in chosen], adapter.device)
                hidden = adapter.backbone(**batch.inputs(), use_cache=False).last_hidden_state
                logits = adapter.logits(hidden[where]).float()
                losses = F.cross_entropy(logits, wanted.to(logits.device), reduction="none")
                gradients = torch.autograd.grad(losses.sum(), outputs)
            parts = (
                torch.stack([x[where].float().cpu() for x in inputs]).split(lengths, dim=1),
                torch.stack([x[where].float().cpu() for x in gradients]).split(lengths, dim=1),
                losses.detach().cpu().split(lengths),
            )
            for i, keys, gradient, loss in zip(indices, *parts, strict=True):
                found[i] = AnswerGradients(keys=keys, gradients=gradient, losses=loss)
    finally:
        for handle in handles:
            handle.remove()
    return [found[i] for i in range(len(rows))]
