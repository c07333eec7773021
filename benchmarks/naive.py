"""The target value search and the metrics as public code runs them, to compare with: one after the other, the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rect_lightning.models import Adapter
from rect_lightning.models.encoding import encode
from rect_lightning.solving.batching import pad
from rect_lightning.solving.search_batches import SearchRows
from rect_lightning.solving.values import ValueSearch


def naive_search(adapter: Adapter, layer: int, requests: Sequence[SearchRows], search: ValueSearch) -> Tensor:
    """The offsets, ``[requests, width]``: all layers, all positions and all logits of a request's rows, at every step."""
    return torch.stack([_one(adapter, layer, request, search) for request in requests])


def _one(adapter: Adapter, layer: int, request: SearchRows, search: ValueSearch) -> Tensor:
    rows = [row.ids[:-1] for row in request.targets] + [request.essence.ids]
    batch = pad(rows, adapter.device)
    subjects = torch.tensor([row.subject for row in (*request.targets, request.essence)])
    each = torch.arange(len(rows))
    offset = torch.zeros(adapter.model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([offset], lr=search.lr)
    stream: list[Tensor] = []
    before: list[Tensor] = []

    def add(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        if not stream:
            stream.append(output[0, subjects[0]].detach().clone())
        here = torch.zeros(*output.shape[:2], 1)
        here[each, subjects] = 1
        return output + here * offset

    handle = adapter.blocks[layer].register_forward_hook(add)
    try:
        for step in range(search.steps):
            log_probs = adapter.model(**batch.inputs()).logits.log_softmax(-1)
            now = log_probs[-1, subjects[-1]]
            before = before or [now.detach().clone()]
            nll = torch.stack(
                [
                    -log_probs[i, range(row.target - 1, len(row.ids) - 1), list(row.target_ids)].mean()
                    for i, row in enumerate(request.targets)
                ]
            ).mean()
            kl = F.kl_div(before[0], now, log_target=True, reduction="sum")
            loss = nll + search.kl * kl + search.weight_decay * offset.norm() / stream[0].norm() ** 2
            if loss < search.stop or step == search.steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            limit = search.clamp * stream[0].norm()
            with torch.no_grad():
                offset *= (limit / offset.norm()).clamp(max=1)
    finally:
        handle.remove()
    return offset.detach()


@torch.no_grad()
def naive_scores(adapter: Adapter, prompts: Sequence[str], targets: Sequence[str]) -> list[float]:
    """The mean log-probability of each target after its prompt: a forward pass for each, all logits."""
    found = []
    for row in encode(adapter.tokenizer, prompts, targets):
        log_probs = adapter.model(torch.tensor([row.ids], device=adapter.device)).logits.log_softmax(-1)
        places = range(row.target - 1, len(row.ids) - 1)
        found.append(float(log_probs[0, list(places), list(row.target_ids)].mean()))
    return found
