"""Integrated gradients against the plain model in float64, one row and one step at a time."""

from __future__ import annotations

import pytest
import torch

from rect_lightning.solving.attribution import attributions, found_neurons
from tests import tiny

PROMPTS = ["The mother tongue of Danielle Darrieux is", "I think", "What is the capital of Spain?", "You"]
TOKENS = [300, 17, 260, 5]
LAYERS = [0, 2, 3]


def rows_of(adapter):
    return [adapter.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def activations(model, projection, ids):
    """What the down projection reads at the last column, float64."""
    seen = {}
    handle = projection.register_forward_pre_hook(lambda _m, args: seen.update(w=args[0][0, -1]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen["w"]


def probability(model, projection, ids, token, w):
    """The token's probability where the down projection reads ``w`` at the last column instead."""

    def replace(_module, args):
        return (torch.cat([args[0][:, :-1], w[None, None]], dim=1),)

    handle = projection.register_forward_pre_hook(replace)
    try:
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token]
    finally:
        handle.remove()


def naive_attributions(adapter, layer, ids, token, steps):
    """``w/m Σₖ ∂P((k/m) w)/∂w``, float64 ``[inner width]``."""
    model, projection = adapter.model.double(), adapter.projection(layer)
    try:
        w = activations(model, projection, ids)
        total = torch.zeros_like(w)
        for k in range(1, steps + 1):
            scaled = (w * k / steps).requires_grad_()
            total += torch.autograd.grad(probability(model, projection, ids, token, scaled), scaled)[0]
        return w * total / steps
    finally:
        model.float()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("together", [True, False])
def test_attributions_are_the_plain_model_s(family, together):
    adapter = tiny.adapter(family)
    rows = rows_of(adapter)
    if together:
        found = attributions(adapter, rows, TOKENS, LAYERS, steps=3)
    else:
        alone = [attributions(adapter, [r], [t], LAYERS, steps=3) for r, t in zip(rows, TOKENS, strict=True)]
        found = torch.cat(alone)
    expected = torch.stack(
        [
            torch.stack([naive_attributions(adapter, layer, row, token, 3) for layer in LAYERS])
            for row, token in zip(rows, TOKENS, strict=True)
        ]
    )
    assert found.shape == expected.shape
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-4
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in adapter.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_neuron_s_gradient_is_a_difference_of_probabilities(family):
    """Of one neuron at a time, without autograd."""
    adapter, layer, steps, h = tiny.adapter(family), 2, 4, 3e-3  # norms round to fp32
    ids, token = rows_of(adapter)[0], TOKENS[0]
    found = attributions(adapter, [ids], [token], [layer], steps=steps)[0, 0]
    model, projection = adapter.model.double(), adapter.projection(layer)
    w = activations(model, projection, ids)
    for neuron in found.abs().topk(5).indices.tolist():
        bump = torch.zeros_like(w)
        bump[neuron] = h
        with torch.no_grad():
            slopes = [
                (
                    probability(model, projection, ids, token, w * k / steps + bump)
                    - probability(model, projection, ids, token, w * k / steps - bump)
                )
                / (2 * h)
                for k in range(1, steps + 1)
            ]
        expected = w[neuron] * sum(slopes) / steps
        torch.testing.assert_close(found[neuron].double(), expected, rtol=2e-3, atol=1e-9)
    model.float()


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if "gemma" not in family])
def test_attributions_of_a_layer_add_up_to_what_its_activations_add(family):
    adapter = tiny.adapter(family)
    ids, token = rows_of(adapter)[0], TOKENS[0]
    found = attributions(adapter, [ids], [token], LAYERS, steps=2000)[0].double().sum(-1)
    model = adapter.model.double()
    for layer, total in zip(LAYERS, found, strict=True):
        projection = adapter.projection(layer)
        w = activations(model, projection, ids)
        with torch.no_grad():
            gain = probability(model, projection, ids, token, w) - probability(model, projection, ids, token, 0 * w)
        assert abs(total - gain) < 2e-3 * abs(gain) + 2e-6
    model.float()


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_found_are_those_near_the_largest_of_all_layers(tiny, budget):
    rows = rows_of(tiny)
    found = found_neurons(tiny, rows, TOKENS, LAYERS, steps=3, threshold=0.3, budget=budget)
    scores = torch.cat([attributions(tiny, [r], [t], LAYERS, steps=3) for r, t in zip(rows, TOKENS, strict=True)])
    expected = torch.stack([row >= 0.3 * row.max() for row in scores])
    assert torch.equal(found, expected)
    assert found.any(dim=(1, 2)).all()
    assert found.float().mean() < 0.2
    assert (found.sum(-1) == 0).any(), "the threshold counts over all layers, so some has none"


def test_where_no_attribution_is_positive_none_is_found(tiny):
    for layer in LAYERS:
        tiny.projection(layer).weight.data.zero_()
    assert not found_neurons(tiny, rows_of(tiny), TOKENS, LAYERS, steps=2).any()


def test_attributions_follow_the_weights_as_they_stand(tiny):
    rows = rows_of(tiny)[:1]
    before = attributions(tiny, rows, TOKENS[:1], LAYERS, steps=2)
    tiny.weight(3).data *= 2
    after = attributions(tiny, rows, TOKENS[:1], LAYERS, steps=2)
    assert not torch.allclose(before, after)
