"""The gradient of a weight, taken apart: for each token the input of its layer and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row
from rect_lightning.solving.likelihood import negative_log_likelihood, places
from rect_lightning.solving.upper import Lower, run_upper


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGradients:
    """The gradients of one row's loss by the weights of some layers, ``delta.T @ u``, by the tokens that contribute to them.

    Attributes:
        loss: The negative log-likelihood of the row's target, the mean over its tokens, in nats, ``[]`` fp32.
        u: Inputs of each layer's down projection, ``[tokens, in]`` fp32.
        delta: Gradients of the loss by its outputs, ``[tokens, out]`` fp32.
    """

    loss: Tensor
    u: dict[int, Tensor]
    delta: dict[int, Tensor]


def token_gradients(
    adapter: Adapter,
    lower: Iterable[Lower],
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    predicting: bool = False,
    device: torch.device | None = None,
) -> list[TokenGradients]:
    """Take the gradients of each row's negative log-likelihood of its target apart; no weight gets a gradient.

    Each row's loss is its own, so what else is in a batch makes no difference.

    Args:
        adapter: The model.
        lower: All the rows, with or without their last tokens, run up to the first of the layers.
        rows: Prompts with their targets.
        layers: The layers, in order; one pass serves them all.
        predicting: Whether to leave out all tokens but those from which the target's are predicted, one for each of them.
        device: Where to keep what is found, by default where it is computed.

    Returns:
        One record a row, in the order given.
    """
    found: dict[int, TokenGradients] = {}
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
            losses = negative_log_likelihood(adapter, states, read)
            deltas = torch.autograd.grad(losses.sum(), [outputs[layer] for layer in layers])
        for j, i in enumerate(batch.rows):
            u, delta = {}, {}
            for layer, gradient in zip(layers, deltas, strict=True):
                tokens = read.column[read.row == j] if predicting else gradient[j].any(-1)
                u[layer] = inputs[layer][j, tokens].float().to(device)
                delta[layer] = gradient[j, tokens].float().to(device)
            found[i] = TokenGradients(loss=losses[j].detach().to(device), u=u, delta=delta)
    return [found[i] for i in range(len(rows))]
