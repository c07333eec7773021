"""Each family's adapter against the family's own modules and the plain Hugging Face model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rect_lightning.data import EditRequest
from rect_lightning.models import FAMILIES, adapter_for
from rect_lightning.solving.blocks import Tail
from rect_lightning.solving.keys import subject_states
from rect_lightning.solving.solvers import Factored, rank_one
from rect_lightning.solving.texts import key_rows, search_rows
from rect_lightning.solving.values import ValueSearch, search_values
from tests import tiny as tiny_models

every_family = pytest.mark.parametrize("family", tiny_models.FAMILIES)
LAYER = 1


def _phi3(mlp, x):
    gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return up * mlp.activation_fn(gate)


INNER = {
    "gpt2": lambda mlp, x: mlp.act(mlp.c_fc(x)),
    "gptj": lambda mlp, x: mlp.act(mlp.fc_in(x)),
    "gpt_neox": lambda mlp, x: mlp.act(mlp.dense_h_to_4h(x)),
    "phi3": _phi3,
}
"""The key from the MLP's input, spelt out; all other families are gated alike."""


def gated(mlp, x):
    return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


@pytest.fixture
def ids():
    return torch.randint(2, 400, (2, 9))


def hear(module, run):
    """Input and output of a module while something runs."""
    heard = []
    handle = module.register_forward_hook(lambda _m, args, output: heard.append((args[0], output)))
    with torch.no_grad():
        run()
    handle.remove()
    assert len(heard) == 1
    return heard[0]


# places -----------------------------------------------------------------------------------------------------------


@every_family
def test_the_projection_maps_key_to_value(family, ids):
    adapter = tiny_models.adapter(family)
    block = adapter.blocks[LAYER]
    into_mlp, out_of_mlp = hear(block.mlp, lambda: adapter.model(ids))
    key, value = hear(adapter.projection(LAYER), lambda: adapter.model(ids))
    with torch.no_grad():
        torch.testing.assert_close(key, INNER.get(family, gated)(block.mlp, into_mlp))
    torch.testing.assert_close(value, out_of_mlp)
    assert adapter.weight(LAYER) is dict(adapter.model.named_parameters())[adapter.projection_name(LAYER) + ".weight"]
    assert len(adapter.blocks) == adapter.num_layers == adapter.model.config.get_text_config().num_hidden_layers


@every_family
def test_whether_the_block_adds_the_value_as_it_is(family, ids):
    """Change the value by a forward hook, and see what comes of it in the residual stream."""
    adapter = tiny_models.adapter(family)
    randomise_norms(adapter.model)
    change = torch.randn(2, 9, 32)
    _, before = hear(adapter.blocks[LAYER], lambda: adapter.model(ids))
    _, value = hear(adapter.projection(LAYER), lambda: adapter.model(ids))
    handle = adapter.projection(LAYER).register_forward_hook(lambda _m, _a, output: output + change)
    _, after = hear(adapter.blocks[LAYER], lambda: adapter.model(ids))
    handle.remove()
    before, after = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    with torch.no_grad():
        expected = adapter.stream_change(LAYER, value, change)
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)
    assert adapter.writes_to_stream == torch.allclose(after - before, change, atol=1e-5)


@every_family
def test_backbone_and_logits_are_the_model(family, ids):
    adapter = tiny_models.adapter(family)
    with torch.no_grad():
        expected = adapter.model(ids).logits
        hidden = adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(adapter.logits(hidden), expected)
        last = hear(adapter.blocks[-1], lambda: adapter.model(ids))[1]
        last = last[0] if isinstance(last, tuple) else last
        torch.testing.assert_close(adapter.norm(last), hidden)
        other_head = nn.Linear(32, 400, bias=False)
        assert not torch.allclose(adapter.logits(hidden, other_head), expected)


def test_gemma2_caps_its_logits(ids):
    """With logits so large that the cap of 30 shows."""
    adapter = tiny_models.adapter("gemma2")
    adapter.head.weight.data *= 40
    with torch.no_grad():
        expected = adapter.model(ids).logits
        hidden = adapter.backbone(input_ids=ids, use_cache=False).last_hidden_state
        assert expected.abs().max() > 25
        torch.testing.assert_close(adapter.logits(hidden), expected)
        assert (adapter.head(hidden) - expected).abs().max() > 5


@every_family
def test_context_length_and_device(family):
    adapter = tiny_models.adapter(family)
    assert adapter.context_length == 128
    assert adapter.device == torch.device("cpu")


# orientation ------------------------------------------------------------------------------------------------------


@every_family
def test_an_oriented_update_does_to_the_value_what_its_matrix_says(family, ids):
    adapter = tiny_models.adapter(family)
    assert_oriented(adapter, ids)


def test_square_conv1d_and_square_linear(ids):
    """The trap for whoever guesses the orientation by shape."""
    import transformers as hf

    small = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 0}
    conv = hf.GPT2Config(**small, n_embd=32, n_inner=32, n_layer=2, n_head=4)
    linear = hf.LlamaConfig(**small, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    for config in (conv, linear):
        model = hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        adapter = adapter_for(model, tiny_models.tokenizer())
        assert adapter.weight(LAYER).shape == (32, 32)
        assert_oriented(adapter, ids)


def assert_oriented(adapter, ids):
    projection = adapter.projection(LAYER)
    key, before = hear(projection, lambda: adapter.model(ids))
    update = torch.randn(before.shape[-1], key.shape[-1])
    assert torch.equal(adapter.oriented(LAYER, adapter.oriented(LAYER, update)), update)
    adapter.weight(LAYER).data += adapter.oriented(LAYER, update)
    with torch.no_grad():
        torch.testing.assert_close(projection(key) - before, key @ update.T, rtol=1e-4, atol=1e-4)


# Gemma's norm after the MLP ---------------------------------------------------------------------------------------


def randomise_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.3


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_meets_the_direction_and_keeps_the_size(family):
    adapter = tiny_models.adapter(family)
    randomise_norms(adapter.model)
    norm = adapter.blocks[LAYER].post_feedforward_layernorm
    value, change = 3 * torch.randn(5, 32), torch.randn(5, 32)
    with torch.no_grad():
        found = adapter.value_change(LAYER, value, change)
        reached = norm(value) + adapter.stream_change(LAYER, value, found)
        assert torch.cosine_similarity(reached, norm(value) + change).min() > 1 - 1e-5
    torch.testing.assert_close((value + found).norm(dim=-1), value.norm(dim=-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_takes_back_what_it_can(family):
    """A change that keeps the value's size is found again from what it does to the stream."""
    adapter = tiny_models.adapter(family)
    randomise_norms(adapter.model)
    value, other = 3 * torch.randn(5, 32), torch.randn(5, 32)
    change = other * value.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True) - value
    with torch.no_grad():
        in_stream = adapter.stream_change(LAYER, value, change)
        assert not torch.allclose(in_stream, change, atol=0.1)
        torch.testing.assert_close(adapter.value_change(LAYER, value, in_stream), change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if not f.startswith("gemma")])
def test_other_families_take_changes_as_they_are(family):
    adapter = tiny_models.adapter(family)
    value, change = torch.randn(5, 32), torch.randn(5, 32)
    assert torch.equal(adapter.stream_change(LAYER, value, change), change)
    assert torch.equal(adapter.value_change(LAYER, value, change), change)


# what is refused --------------------------------------------------------------------------------------------------


def test_unknown_family():
    model = tiny_models.model("llama")
    model.config.model_type = "rwkv9"
    with pytest.raises(ValueError, match=r"'rwkv9' \(known: .*gpt2.*\).*subclass .*Adapter.*models/__init__.py"):
        adapter_for(model, tiny_models.tokenizer())


def test_no_model_type_has_two_adapters():
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))


def test_slow_tokenizer():
    with pytest.raises(TypeError, match=r"no character offsets.*fast tokenizer"):
        adapter_for(tiny_models.model("llama"), SimpleNamespace(is_fast=False))


def test_a_projection_that_is_no_matrix():
    model = tiny_models.model("llama")
    model.model.layers[2].mlp.down_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"model\.layers\.2\.mlp\.down_proj is a Identity"):
        adapter_for(model, tiny_models.tokenizer())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_quantised_projection(family):
    model = tiny_models.model(family)
    projection = tiny_models.adapter_for(model, tiny_models.tokenizer()).projection(3)
    projection.weight = nn.Parameter(projection.weight.mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"\.3\..*torch.int8 weights.*unquantised"):
        adapter_for(model, tiny_models.tokenizer())


@pytest.mark.parametrize("layers", [[], [1, 1], [2, 1]])
def test_layers_out_of_order(tiny, layers):
    with pytest.raises(ValueError, match="increasing and distinct"):
        tiny.check_layers(layers)


@pytest.mark.parametrize("layers", [[-1], [-1, 2], [0, 4], [17]])
def test_layers_out_of_range(tiny, layers):
    with pytest.raises(ValueError, match=r"do not fit a model of 4 layers \(0 to 3\)"):
        tiny.check_layers(layers)


def test_good_layers(tiny):
    tiny.check_layers([0])
    tiny.check_layers([0, 1, 3])


# an edit ----------------------------------------------------------------------------------------------------------


@every_family
def test_an_edit_changes_one_weight_and_makes_the_model_say_the_target(family):
    """A target value from the search and a rank-one update that spares the prompt's other tokens."""
    adapter = tiny_models.adapter(family)
    # a random model listens little to one token: give its answers some spread, and Gemma's MLP some weight in the stream
    adapter.head.weight.data *= 5
    if not adapter.writes_to_stream:
        adapter.blocks[LAYER].post_feedforward_layernorm.weight.data += 20
    request = EditRequest(id="0", subject="LeBron James", prompt="The sport of {}", target_new="French")
    search = ValueSearch(steps=60, lr=0.5, weight_decay=0, clamp=1e6, kl=0, stop=0.1)
    [rows] = search_rows(adapter, [request], ["{}"])
    values = search_values(adapter, Tail(adapter, LAYER, torch.float32), [rows], search)
    [row] = rows.targets
    assert answers(adapter, row) != row.target_ids, "the model says the target unedited"
    assert values.losses.nan_to_num(torch.inf).min() < 0.7, (
        "the search is to make the target likelier than all the rest"
    )

    states = subject_states(adapter, key_rows(adapter, [request], ["{}"]), LAYER)
    all_keys, _ = hear(adapter.projection(LAYER), lambda: adapter.model(torch.tensor([row.ids])))
    torch.testing.assert_close(states.key[0], all_keys[0, row.subject], rtol=1e-4, atol=1e-5)
    key, others = states.key[0], torch.cat([all_keys[0, : row.subject], all_keys[0, row.subject + 1 :]]).double()
    moment = Factored(others.T @ others + 1e-6 * torch.eye(len(key)), "C")
    update = rank_one(values.offset[0], moment.solve(key[:, None])[:, 0], key)

    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    adapter.weight(LAYER).data += adapter.oriented(LAYER, update).float()
    changed = [name for name, tensor in adapter.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [adapter.projection_name(LAYER) + ".weight"]
    assert answers(adapter, row) == row.target_ids


def answers(adapter, row):
    """The likeliest token at each of the target's places."""
    with torch.no_grad():
        likeliest = adapter.model(torch.tensor([row.ids])).logits[0].argmax(-1)
    return tuple(likeliest[row.target - 1 : -1].tolist())
