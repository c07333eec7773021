"""Rows run in two parts, with changes in between, against the whole model with changed weights."""

import copy

import pytest
import torch

from rect_lightning.models import adapter_for
from rect_lightning.models.encoding import encode
from rect_lightning.solving.likelihood import divergence, negative_log_likelihood, places
from rect_lightning.solving.upper import run_lower, run_upper
from tests import tiny
from tests.solving.naive_values import doubled

PROMPTS = ["The mother tongue of Danielle Darrieux is", "Paris", "The sport of LeBron James is"]
TARGETS = ["the city of Paris", "Madrid", "so. I know"]


def setting(family):
    adapter = doubled(tiny.adapter(family))
    return adapter, encode(adapter.tokenizer, PROMPTS, TARGETS)


def updates(adapter, layers):
    return {n: torch.randn_like(adapter.oriented(n, adapter.weight(n))) * 0.1 for n in layers}


def changed(adapter, deltas):
    """A copy of the model whose weights have changed."""
    copied = adapter_for(copy.deepcopy(adapter.model), adapter.tokenizer)
    for layer, delta in deltas.items():
        copied.weight(layer).data += copied.oriented(layer, delta)
    return copied


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layers", [[0], [1, 3], [3]])
@pytest.mark.parametrize("budget", [4096, 8])
def test_changes_are_those_of_the_weights(family, layers, budget):
    adapter, rows = setting(family)
    deltas = updates(adapter, layers)
    changes = {layer: lambda key, delta=delta: key @ delta.T for layer, delta in deltas.items()}
    expected = changed(adapter, deltas)
    seen = []
    for batch in run_lower(adapter, [row.ids for row in rows], layers[0], budget=budget):
        for _ in range(2):  # the lower part serves any number of times
            states = run_upper(adapter, batch, changes)
        plain = run_upper(adapter, batch, {})
        for j, i in enumerate(batch.rows):
            ids = torch.tensor([rows[i].ids])
            for model, found in ((expected, states), (adapter, plain)):
                whole = model.backbone(input_ids=ids).last_hidden_state[0]
                # parts of Gemma stay in fp32
                torch.testing.assert_close(found[j, : ids.shape[1]], whole, atol=1e-5, rtol=1e-4)
        seen += batch.rows
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("loss", ["target", "last", "all"])
def test_likelihoods_are_those_of_one_text_at_a_time(loss):
    adapter, rows = setting("llama")
    (batch,) = run_lower(adapter, [row.ids for row in rows], 0)
    read = places([rows[i] for i in batch.rows], loss, adapter.device)
    found = negative_log_likelihood(adapter, run_upper(adapter, batch, {}), read)
    for j, i in enumerate(batch.rows):
        ids, target = rows[i].ids, rows[i].target
        log_probs = adapter.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = 1 if loss == "all" else target
        picked = [log_probs[target - 1 if loss == "last" else j - 1, ids[j]] for j in range(start, len(ids))]
        assert float(found[j]) == pytest.approx(-float(sum(picked)) / len(picked), rel=1e-5)


def test_divergence_is_the_mean_over_each_row_s_tokens():
    adapter, rows = setting("llama")
    deltas = updates(adapter, [1, 2])
    other = changed(adapter, deltas)
    (batch,) = run_lower(adapter, [row.ids for row in rows], 1)
    changes = {layer: lambda key, delta=delta: key @ delta.T for layer, delta in deltas.items()}
    lengths = [len(rows[i].ids) for i in batch.rows]
    found = divergence(adapter, run_upper(adapter, batch, {}), run_upper(adapter, batch, changes), lengths)
    for j, i in enumerate(batch.rows):
        ids = torch.tensor([rows[i].ids])
        before, after = (model.model(ids).logits[0].softmax(-1) for model in (adapter, other))
        assert float(found[j]) == pytest.approx(float((before * (before / after).log()).sum(-1).mean()), rel=1e-4)
    assert found.min() > 0
