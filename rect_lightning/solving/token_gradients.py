"""The gradient of a weight, taken apart: for each token the input of its layer and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row
from rect_lightning.solving.likelihood import negative_log_likelihood, places
from rect_lightning.solving.upper import Lower, run_upper


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """The gradient of one row's loss by one layer's weight, ``delta.T @ u``, by the tokens that contribute to it.

    Attributes:
        u: Inputs of the down projection, ``[tokens, in]``, fp32.
        delta: Gradients of the loss by its outputs, ``[tokens, out]``, fp32.
    """

    u: Tensor
    delta: Tensor


def token_gradients(
    adapter: Adapter, lower: Sequence[Lower], rows: Sequence[Row], layers: Sequence[int]
) -> dict[int, list[TokenGradients]]:
    """Take the gradients of each row's negative log-likelihood of its target apart, of some layers.

    Each row's loss is its own, so what else is in a batch makes no difference.

    Args:
        adapter: The model.
        lower: All the rows, run up to the first of the layers.
        rows: Prompts with their targets.
        layers: The layers, in order.
    """
    found: dict[int, dict[int, TokenGradients]] = {layer: {} for layer in layers}
    for batch in lower:
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def probe(layer: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
            def change(key: Tensor) -> Tensor:
                # what is added to the output is zero, and has the output's gradient
                width = adapter.oriented(layer, adapter.weight(layer)).shape[0]
                inputs[layer], outputs[layer] = key.detach(), key.new_zeros(*key.shape[:-1], width).requires_grad_()
                return outputs[layer]

            return change

        with torch.enable_grad():
            states = run_upper(adapter, batch, {layer: probe(layer, inputs, outputs) for layer in layers})
            read = places([rows[i] for i in batch.rows], "target", states.device)
            loss = negative_log_likelihood(adapter, states, read).sum()
        deltas = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
        for layer, delta in zip(layers, deltas, strict=True):
            for j, i in enumerate(batch.rows):
                contributes = delta[j].any(-1)
                u = inputs[layer][j, contributes].float()
                found[layer][i] = TokenGradients(u, delta[j, contributes].float())
    return {layer: [of_rows[i] for i in range(len(rows))] for layer, of_rows in found.items()}
