"""Running part of a decoder gives what the whole decoder gives."""

from __future__ import annotations

import pytest
import torch

from rect_lightning.solving.attention import plain_attention
from rect_lightning.solving.batching import pad
from rect_lightning.solving.blocks import Tail, ending_at, first, run_to, select_rows
from tests import tiny as tiny_models

every_family = pytest.mark.parametrize("family", tiny_models.FAMILIES)
# the second is longer than the sliding windows of 16 before and after its anchor
ROWS = [tuple(torch.randint(2, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (6, 44, 9, 25)]
ANCHORS = [1, 20, 8, 3]
COLUMN = 20


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def plain(adapter, row):
    """Every block's output, every projection's output and the logits, of one row through the plain model."""
    streams, values = [], []
    handles = [b.register_forward_hook(lambda _m, _a, output: streams.append(first(output)[0])) for b in adapter.blocks]
    handles += [
        adapter.projection(n).register_forward_hook(lambda _m, _a, output: values.append(output[0]))
        for n in range(adapter.num_layers)
    ]
    logits = adapter.model(torch.tensor([row])).logits[0]
    for handle in handles:
        handle.remove()
    return streams, values, logits


def assert_rows(together, batch, alone, from_column=0):
    """The real columns of each row, from a column of the batch on."""
    for i, expected in enumerate(alone):
        real = batch.attention_mask[i].bool()
        skipped = int(real[:from_column].sum())
        found = together[i][real[from_column:]]
        torch.testing.assert_close(found, expected[skipped:], rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_run_to_and_the_whole_tail(family, layer):
    adapter = tiny_models.adapter(family)
    alone = [plain(adapter, row) for row in ROWS]
    batch = pad(ROWS, adapter.device, anchors=ANCHORS)
    with plain_attention(adapter):
        trace = run_to(adapter, batch, layer)
        assert_rows(trace.hidden, batch, [streams[layer] for streams, _, _ in alone])
        assert_rows(trace.value, batch, [values[layer] for _, values, _ in alone])
        assert len(trace.calls) == 3 - layer
        tail = Tail(adapter, layer, torch.float32)
        calls, states = tail.suffix_calls(trace, 0)
        last = tail.run(trace.hidden, calls)
    assert_rows(states, batch, [streams[-1] for streams, _, _ in alone])
    assert_rows(last, batch, [streams[-1] for streams, _, _ in alone])
    assert_rows(tail.logits(last), batch, [logits for _, _, logits in alone])


@every_family
def test_the_columns_from_the_anchor_on(family):
    """With the earlier columns as a prefix cache, twice, since a cache that grew would show the second time."""
    adapter = tiny_models.adapter(family)
    alone = [plain(adapter, row)[0][-1] for row in ROWS]
    batch = pad(ROWS, adapter.device, anchors=ANCHORS)
    with plain_attention(adapter):
        trace = run_to(adapter, batch, 1)
        tail = Tail(adapter, 1, torch.float32)
        calls, _ = tail.suffix_calls(trace, COLUMN)
        for _ in range(2):
            found = tail.run(trace.hidden[:, COLUMN:], calls)
            assert found.shape[1] == batch.input_ids.shape[1] - COLUMN
            assert_rows(found, batch, alone, COLUMN)


@every_family
@pytest.mark.parametrize("rows", [[0], [1, 3], [3, 2, 0]])
def test_some_of_the_rows(family, rows):
    adapter = tiny_models.adapter(family)
    batch = pad(ROWS, adapter.device, anchors=ANCHORS)
    with plain_attention(adapter):
        trace = run_to(adapter, batch, 1)
        tail = Tail(adapter, 1, torch.float32)
        calls, _ = tail.suffix_calls(trace, COLUMN)
        whole = tail.run(trace.hidden[:, COLUMN:], calls)
        some = tail.run(trace.hidden[rows, COLUMN:], select_rows(calls, torch.tensor(rows), len(ROWS)))
    torch.testing.assert_close(some, whole[rows], rtol=1e-4, atol=1e-5)


@every_family
def test_rows_selected_twice(family):
    """As when requests finish one after the other."""
    adapter = tiny_models.adapter(family)
    batch = pad(ROWS, adapter.device, anchors=ANCHORS)
    with plain_attention(adapter):
        trace = run_to(adapter, batch, 1)
        tail = Tail(adapter, 1, torch.float32)
        calls, _ = tail.suffix_calls(trace, COLUMN)
        whole = tail.run(trace.hidden[:, COLUMN:], calls)
        three = select_rows(calls, torch.tensor([0, 1, 3]), 4)
        two = select_rows(three, torch.tensor([1, 2]), 3)
        some = tail.run(trace.hidden[[1, 3], COLUMN:], two)
    torch.testing.assert_close(some, whole[[1, 3]], rtol=1e-4, atol=1e-5)


def test_a_tail_that_cannot_be_packed_is_the_models_own(tiny, monkeypatch):
    monkeypatch.setattr("rect_lightning.solving.blocks.can_pack", lambda *_: False)
    tail = Tail(tiny, 1, torch.float32)
    assert [id(b) for b in tail.blocks] == [id(b) for b in list(tiny.blocks)[2:]]
    assert tail.norm is tiny.norm
    assert tail.head is tiny.head


def test_a_tail_in_the_models_precision_shares_what_is_not_packed(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    tail = Tail(tiny, 1, torch.float32)
    own = {id(parameter) for parameter in tiny.model.parameters()}
    kept = [parameter for part in (*tail.blocks, tail.norm, tail.head) for parameter in part.parameters()]
    assert kept
    assert all(id(parameter) in own for parameter in kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert tiny.model.config._attn_implementation == "sdpa"


def test_a_tail_in_another_precision_is_a_copy(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    tail = Tail(tiny, 1, torch.bfloat16)
    own = {id(parameter) for parameter in tiny.model.parameters()}
    for part in [*tail.blocks, tail.norm, tail.head]:
        for parameter in part.parameters():
            assert parameter.dtype == torch.bfloat16
            assert id(parameter) not in own
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert tiny.model.config._attn_implementation == "sdpa"


@every_family
def test_a_bf16_tail_is_near(family):
    """Padded columns must not become nan, which they would where a mask's fp32 minimum turns into -inf."""
    adapter = tiny_models.adapter(family)
    batch = pad(ROWS, adapter.device, anchors=ANCHORS)
    with plain_attention(adapter):
        trace = run_to(adapter, batch, 1)
        exact, rough = Tail(adapter, 1, torch.float32), Tail(adapter, 1, torch.bfloat16)
        expected = exact.run(trace.hidden[:, COLUMN:], exact.suffix_calls(trace, COLUMN)[0])
        found = rough.run(trace.hidden[:, COLUMN:], rough.suffix_calls(trace, COLUMN)[0])
    assert found.dtype == torch.bfloat16
    real = batch.attention_mask[:, COLUMN:].bool()
    assert rough.logits(found).dtype == torch.float32
    assert torch.cosine_similarity(found[real].float(), expected[real], dim=-1).min() > 0.99


def test_ending_at_ends_there_and_only_there(tiny):
    ran = []
    handles = [
        block.register_forward_hook(lambda _m, _a, _o, n=n: ran.append(n)) for n, block in enumerate(tiny.blocks)
    ]
    ids = torch.tensor([ROWS[0]])
    with ending_at(tiny.blocks[1]):
        tiny.backbone(input_ids=ids)
    assert ran == [0, 1]
    tiny.backbone(input_ids=ids)
    assert ran == [0, 1, 0, 1, 2, 3]
    for handle in handles:
        handle.remove()


def test_ending_at_lets_errors_through(tiny):
    with pytest.raises(KeyError), ending_at(tiny.blocks[1]):
        raise KeyError("something else")
    assert not tiny.blocks[1]._forward_hooks


def test_plain_attention_puts_the_models_own_back(tiny):
    config = tiny.model.config
    with plain_attention(tiny):
        assert config._attn_implementation == "rect_lightning_grouped"
    assert config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), plain_attention(tiny):
        raise KeyError("x")
    assert config._attn_implementation == "sdpa"
