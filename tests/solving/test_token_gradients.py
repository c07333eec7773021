"""Inputs and gradients by token, against one row at a time through the whole model."""

import pytest
import torch
from torch.nn import functional as F

from rect_lightning.models.encoding import encode
from rect_lightning.solving.token_gradients import token_gradients
from rect_lightning.solving.upper import run_lower
from tests import tiny
from tests.solving.naive_values import doubled

PROMPTS = ["The mother tongue of Danielle Darrieux is", "LeBron James plays the", "Madrid"]
TARGETS = ["French", "sport of basketball", "is the capital of Spain"]
LAYERS = [0, 2]


def naive(adapter, row, layers):
    """One row in float64, with a gradient of every hidden state."""
    kept = {}

    def keep(layer):
        def hook(_module, args, output):
            kept[layer] = (args[0].detach(), output)
            output.retain_grad()

        return hook

    adapter.model.double().requires_grad_(True)
    handles = [adapter.projection(layer).register_forward_hook(keep(layer)) for layer in layers]
    logits = adapter.model(torch.tensor([row.ids])).logits[0]
    places = range(row.target - 1, len(row.ids) - 1)
    loss = sum(F.cross_entropy(logits[place], torch.tensor(row.ids[place + 1])) for place in places)
    loss.backward()
    for handle in handles:
        handle.remove()
    adapter.model.zero_grad(set_to_none=True)
    adapter.model.float().requires_grad_(False)
    found = [kept[layer] for layer in layers]
    return (
        torch.stack([key[0, places] for key, _ in found]),
        torch.stack([value.grad[0, places] for _, value in found]),
        float(loss.detach()),
    )


def gradients_of(adapter, rows, *, budget=1024, cut=False, **options):
    lower = run_lower(adapter, [row.ids[:-1] if cut else row.ids for row in rows], LAYERS[0], budget=budget)
    return token_gradients(adapter, lower, rows, LAYERS, **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("bos", "cut"), [(False, True), (True, False)])
def test_where_targets_are_predicted_they_are_the_naive_ones(family, bos, cut):
    adapter = tiny.adapter(family, bos=bos)
    rows = encode(adapter.tokenizer, PROMPTS, TARGETS)
    for found, row in zip(gradients_of(adapter, rows, cut=cut, predicting=True), rows, strict=True):
        keys, gradients, loss = naive(adapter, row, LAYERS)
        n = len(row.target_ids)
        assert float(found.loss) * n == pytest.approx(loss, abs=1e-4)
        for layer, key, gradient in zip(LAYERS, keys, gradients, strict=True):
            assert len(key) == n
            torch.testing.assert_close(found.u[layer].double(), key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.delta[layer].double() * n, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_all_together_are_the_gradient_of_the_weight(family, bos):
    adapter = doubled(tiny.adapter(family, bos=bos))
    rows = encode(adapter.tokenizer, PROMPTS, TARGETS)
    found = gradients_of(adapter, rows, budget=20)
    weights = [adapter.weight(layer).requires_grad_() for layer in LAYERS]
    for part, row in zip(found, rows, strict=True):
        log_probs = adapter.model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        loss = -torch.stack([log_probs[j - 1, row.ids[j]] for j in range(row.target, len(row.ids))]).mean()
        for layer, gradient in zip(LAYERS, torch.autograd.grad(loss, weights), strict=True):
            u, delta = part.u[layer], part.delta[layer]
            assert 0 < len(u) == len(delta) < len(row.ids)
            torch.testing.assert_close(delta.T @ u, adapter.oriented(layer, gradient).float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("predicting", [False, True])
def test_batches_do_not_matter_and_no_weight_gets_a_gradient(tiny_tokenizer, trainable, predicting):
    adapter = tiny.adapter("llama")
    for layer in LAYERS:
        adapter.weight(layer).requires_grad_(trainable)
    rows = encode(tiny_tokenizer, PROMPTS, TARGETS)
    together, alone = (gradients_of(adapter, rows, budget=budget, predicting=predicting) for budget in (1024, 1))
    for a, b in zip(together, alone, strict=True):
        for x, y in ((a.loss, b.loss), *((x[n], y[n]) for x, y in ((a.u, b.u), (a.delta, b.delta)) for n in LAYERS)):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
            assert not x.requires_grad
    assert all(p.grad is None for p in adapter.model.parameters())
    assert not any(adapter.projection(layer)._forward_hooks for layer in LAYERS)
