"""The target value search as it is usually written: one request at a time, the whole model, torch's own Adam.

Nothing is left out, padded, cached or batched: each text goes through the plain Hugging Face model alone, all its logits
are computed, and the offset is added by a forward hook on the down projection. Run on a float64 copy of the model
(`doubled`) it says what the numbers should be; on the model itself, what fp32 makes of them.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from rect_lightning.models import adapter_for
from rect_lightning.solving.values import TargetValues


def doubled(adapter):
    """The same model in float64."""
    return adapter_for(copy.deepcopy(adapter.model).double(), adapter.tokenizer)


def naive_search(adapter, layer, requests, search, relative_to="stream"):
    """What `search_values` is to find, request by request."""
    found = [_search_one(adapter, layer, request, search, relative_to) for request in requests]
    return TargetValues(**{name: torch.stack([f[name] for f in found]) for name in found[0]})


def _search_one(adapter, layer, request, search, relative_to):
    value, stream = _at_subject(adapter, layer, request.targets[0])
    origin = {"value": value, "stream": stream}[relative_to]
    essence = request.essence
    before = _log_probs(adapter, essence)[essence.subject]

    offset = torch.zeros_like(value, requires_grad=True)
    adam = torch.optim.Adam([offset], lr=search.lr)
    losses = torch.full((search.steps,), torch.nan)
    for step in range(search.steps):
        nll = 0
        for row in request.targets:
            with _added(adapter, layer, row.subject, offset):
                log_probs = _log_probs(adapter, row)
            of_target = [log_probs[i - 1, row.ids[i]] for i in range(row.target, len(row.ids))]
            nll = nll - torch.stack(of_target).mean() / len(request.targets)
        with _added(adapter, layer, essence.subject, offset):
            now = _log_probs(adapter, essence)[essence.subject]
        kl = F.kl_div(before, now, log_target=True, reduction="sum")
        decay = offset.norm() / origin.norm() ** 2
        loss = nll + search.kl * kl + search.weight_decay * decay
        losses[step] = loss.item()
        if loss < search.stop or step == search.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        limit = search.clamp * origin.norm()
        with torch.no_grad():
            if offset.norm() > limit:
                offset *= limit / offset.norm()
    return {"value": value, "stream": stream, "offset": offset.detach(), "losses": losses}


def _log_probs(adapter, row):
    return adapter.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)


@contextmanager
def _added(adapter, layer, position, offset):
    def add(_module, _args, output):
        here = torch.zeros(output.shape[1], 1, dtype=output.dtype)
        here[position] = 1
        return output + here * offset

    handle = adapter.projection(layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _at_subject(adapter, layer, row):
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: output}))
        for name, module in {"value": adapter.projection(layer), "stream": adapter.blocks[layer]}.items()
    ]
    with torch.no_grad():
        adapter.model(torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    stream = seen["stream"]
    stream = stream[0] if isinstance(stream, tuple) else stream
    return seen["value"][0, row.subject].clone(), stream[0, row.subject].clone()
