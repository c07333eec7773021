"""Keys and gradients at an answer's tokens against one row at a time through the whole model."""

import pytest
import torch
from torch.nn import functional as F

from rect_lightning.models.encoding import encode
from rect_lightning.solving.gradients import answer_gradients
from tests import tiny

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
        float(loss),
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_every_family(family, bos):
    adapter = tiny.adapter(family, bos=bos)
    rows = encode(adapter.tokenizer, PROMPTS, TARGETS)
    for found, row in zip(answer_gradients(adapter, rows, LAYERS), rows, strict=True):
        keys, gradients, loss = naive(adapter, row, LAYERS)
        assert len(row.target_ids) == keys.shape[1] == len(found.losses)
        torch.testing.assert_close(found.keys.double(), keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.gradients.double(), gradients, rtol=1e-3, atol=1e-6)
        assert abs(float(found.losses.sum()) - loss) < 1e-4


@pytest.mark.parametrize("trainable", [False, True])
def test_batches_do_not_matter_and_no_weight_gets_a_gradient(tiny_tokenizer, trainable):
    adapter = tiny.adapter("llama")
    for layer in LAYERS:
        adapter.weight(layer).requires_grad_(trainable)
    rows = encode(tiny_tokenizer, PROMPTS, TARGETS)
    together, alone = (answer_gradients(adapter, rows, LAYERS, budget=budget) for budget in (1024, 1))
    for a, b in zip(together, alone, strict=True):
        for name in ("keys", "gradients", "losses"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)
            assert not getattr(a, name).requires_grad
    assert all(p.grad is None for p in adapter.model.parameters())
    assert not any(adapter.projection(layer)._forward_hooks for layer in LAYERS)
