"""How much each neuron of a decoder's MLPs adds to the probability of an answer (Dai et al. 2022, arXiv 2104.08696)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length, pad
from rect_lightning.solving.blocks import Tail, first, run_to, select_rows


def found_neurons(
    adapter: Adapter,
    rows: Sequence[Sequence[int]],
    tokens: Sequence[int],
    layers: Sequence[int],
    *,
    steps: int = 20,
    threshold: float = 0.2,
    budget: int = 2048,
    show_progress: bool = False,
) -> Tensor:
    """The neurons whose attribution is at least ``threshold`` times the largest one in the same row.

    Args:
        adapter: The model.
        rows: Token ids of the prompts.
        tokens: For each row the id of the answer's token, which its last column predicts.
        layers: The layers to look at, in increasing order.
        steps: Steps of the integral.
        threshold: The share of the largest attribution, over all layers; where none is positive, no neuron is found.
        budget: Rows times columns times steps of one batch. More needs more memory.
        show_progress: Whether to show a bar over the batches.

    Returns:
        Tensor ``[rows, layers, inner width]``, bool.
    """
    order: list[int] = []
    found: list[Tensor] = []
    batches = by_length([len(row) * steps for row in rows], budget)
    for batch in track(batches, "knowledge neurons", show=show_progress, unit="batch"):
        scores = attributions(adapter, [rows[i] for i in batch], [tokens[i] for i in batch], layers, steps=steps)
        largest = scores.amax(dim=(1, 2), keepdim=True)
        found.append((scores >= threshold * largest) & (scores > 0))
        order += batch
    return torch.cat(found)[torch.tensor(order).argsort()]


@torch.no_grad()
def attributions(
    adapter: Adapter, rows: Sequence[Sequence[int]], tokens: Sequence[int], layers: Sequence[int], *, steps: int = 20
) -> Tensor:
    """Integrated gradients of an answer's probability over the activations of each layer's neurons, at the last column.

    ``w/m Σₖ ∂P((k/m) w)/∂w`` for ``k`` from 1 to ``m`` steps (eq. 4 of the paper). ``w`` are the inputs of a layer's down
    projection at the column that predicts the answer, the place of BERT's [MASK] in the paper. All neurons of a layer are
    scaled together, as in the authors' code, so their attributions add up to ``P(w) - P(0)`` as the steps grow. (Not in
    Gemma, whose norm undoes a common scale but at 0 itself; there they only rank the neurons.)

    Nothing before the last column depends on what is scaled, nor does anything below the layer. So the model runs once
    over the prompts, and all steps of a layer are one column each, through the blocks above it. Neurons act through the
    down projection alone, so the gradient is taken with respect to its output.

    Returns:
        Tensor ``[rows, layers, inner width]``, fp32.
    """
    column = max(len(row) for row in rows) - 1
    batch = pad(rows, adapter.device, anchors=[len(row) - 1 for row in rows])
    with _last_column(adapter, layers) as states:
        trace = run_to(adapter, batch, layers[0])
        # in here later blocks run for the first time: `run_to` only notes how they are called
        calls, _ = Tail(adapter, layers[0], None).suffix_calls(trace, column)
    which = torch.arange(len(rows), device=adapter.device).repeat_interleave(steps)
    calls = select_rows(calls, which, len(rows))
    wanted = torch.tensor(tokens, device=adapter.device)[which, None]
    found = []
    for layer in layers:
        key, value, stream = (states[layer][name] for name in ("key", "value", "stream"))
        weight = adapter.oriented(layer, adapter.weight(layer))
        shares = torch.arange(1, steps + 1, device=key.device) / steps
        change = (shares - 1)[:, None] * (key @ weight.T)[:, None]  # [rows, steps, width]; a bias stays
        tail = Tail(adapter, layer, None)
        with torch.enable_grad():
            change.requires_grad_()
            hidden = stream[:, None] + adapter.stream_change(layer, value[:, None].expand_as(change), change)
            hidden = tail.run(hidden.flatten(0, 1)[:, None], calls[layer - layers[0] :])
            probabilities = tail.logits(hidden[:, 0]).softmax(-1).gather(-1, wanted)
            (gradient,) = torch.autograd.grad(probabilities.sum(), change)
        found.append(key * (gradient.mean(dim=1) @ weight))
    return torch.stack(found, dim=1)


@contextmanager
def _last_column(adapter: Adapter, layers: Sequence[int]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Inside, notes of each layer the last column of its down projection's input and output, and of its block's output."""
    states: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}

    def watch(layer: int) -> None:
        def keep_projection(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            states[layer] |= {"key": args[0][:, -1], "value": output[:, -1]}

        def keep_stream(_module: nn.Module, _args: Any, output: Any) -> None:
            states[layer]["stream"] = first(output)[:, -1]

        stack.callback(adapter.projection(layer).register_forward_hook(keep_projection).remove)
        stack.callback(adapter.blocks[layer].register_forward_hook(keep_stream).remove)

    with ExitStack() as stack:
        for layer in layers:
            watch(layer)
        yield states
