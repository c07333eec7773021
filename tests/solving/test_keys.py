"""Keys, values and the stream at the subject, against plain hooks on one row at a time."""

from __future__ import annotations

import pytest
import torch

from rect_lightning.models.encoding import Row
from rect_lightning.solving.keys import subject_states
from tests import tiny as tiny_models

LAYER = 2


def rows_of(*pairs):
    """Rows of random tokens, given as (length, subject)."""
    return [Row(ids=tuple(torch.randint(2, 400, (n,)).tolist()), target=n, subject=s) for n, s in pairs]


def naive(adapter, rows, layer):
    """Each whole row through the whole model."""
    found = {"key": [], "value": [], "stream": []}
    for row in rows:

        def at_projection(_module, args, output, row=row):
            found["key"].append(args[0][0, row.subject])
            found["value"].append(output[0, row.subject])

        def at_block(_module, _args, output, row=row):
            found["stream"].append((output[0] if isinstance(output, tuple) else output)[0, row.subject])

        handles = [
            adapter.projection(layer).register_forward_hook(at_projection),
            adapter.blocks[layer].register_forward_hook(at_block),
        ]
        with torch.no_grad():
            adapter.model(torch.tensor([row.ids]))
        for handle in handles:
            handle.remove()
    return {name: torch.stack(states) for name, states in found.items()}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("budget", [1, 30, 8192])
def test_subject_states(family, budget):
    """Subjects at the start, inside, at the end, and beyond the sliding windows of 16."""
    adapter = tiny_models.adapter(family)
    rows = rows_of((7, 3), (40, 35), (5, 0), (12, 11), (9, 3), (22, 20))
    found = subject_states(adapter, rows, LAYER, budget=budget)
    for name, expected in naive(adapter, rows, LAYER).items():
        states = getattr(found, name)
        assert states.dtype == torch.float32
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 3])
def test_first_and_last_layer(tiny, layer):
    rows = rows_of((7, 3), (12, 11))
    found = subject_states(tiny, rows, layer)
    for name, expected in naive(tiny, rows, layer).items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_read_as_they_stand(tiny):
    """The point of reading again after each layer's update."""
    rows = rows_of((7, 3), (12, 11))
    before = subject_states(tiny, rows, LAYER)
    tiny.weight(LAYER - 1).data *= 2
    after = subject_states(tiny, rows, LAYER)
    assert not torch.allclose(before.key, after.key, atol=1e-3)
    torch.testing.assert_close(after.key, naive(tiny, rows, LAYER)["key"], rtol=1e-4, atol=1e-5)


def test_fp32_of_a_bf16_model(tiny):
    tiny.model.bfloat16()
    found = subject_states(tiny, rows_of((7, 3)), LAYER)
    assert {found.key.dtype, found.value.dtype, found.stream.dtype} == {torch.float32}


def test_later_layers_do_not_run_and_no_hook_stays(tiny):
    ran = []
    handle = tiny.blocks[LAYER + 1].register_forward_hook(lambda *_: ran.append(1))
    subject_states(tiny, rows_of((7, 3)), LAYER)
    handle.remove()
    assert ran == []
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_no_hook_stays_after_an_error(tiny):
    with pytest.raises(IndexError):
        subject_states(tiny, [Row(ids=(5, 10_000), target=2, subject=1)], LAYER)  # no such token
    assert not any(module._forward_hooks for module in tiny.model.modules())
