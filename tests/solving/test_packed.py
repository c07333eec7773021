"""Packed linear layers against plain ones."""

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rect_lightning.solving import packed
from rect_lightning.solving.packed import can_pack, pack, same_input
from tests import tiny as tiny_models


def layers():
    """A plain layer, its weight as ``[out, in]``, and its bias."""
    torch.manual_seed(0)
    with_bias, without, conv = nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)
    nn.init.normal_(conv.bias)
    return {
        "bias": (with_bias, with_bias.weight, with_bias.bias),
        "no bias": (without, without.weight, torch.zeros(40)),
        "conv": (conv, conv.weight.T, conv.bias),
    }


@pytest.mark.parametrize("kind", ["bias", "no bias", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (0, 24), (48, 24)])
def test_the_same_products_forwards_and_backwards(kind, dtype, shape):
    layer, weight, bias = layers()[kind]
    layer = layer.to(dtype)
    if not can_pack([layer], dtype):
        pytest.skip(f"oneDNN does not serve {dtype} here")
    x = torch.randn(shape).to(dtype).requires_grad_()
    found = pack(layer)(x)
    weight, bias = weight.to(dtype).double(), bias.to(dtype).double()
    wanted = x.double() @ weight.T + bias
    precision = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **precision)
    up = torch.randn(found.shape).to(dtype)
    (gradient,) = torch.autograd.grad(found, x, up)
    torch.testing.assert_close(gradient.double(), up.double() @ weight, **precision)


def test_products_have_few_shapes():
    """Of each oneDNN keeps code. An eighth more rows at most where there are many, and never fewer."""
    found = [packed.recurring(rows) for rows in range(1, 8193)]
    assert found[:33] == [1, 2, 4, 4, *[8] * 4, *[16] * 8, *[32] * 16, 48]
    assert all(rows <= more <= max(rows + 15, rows * 9 / 8) for rows, more in enumerate(found, start=1))
    assert len({*found[:384]}) == 24
    assert len({*found}) == 60
    assert packed.recurring(0) == 0


def test_products_are_filled_up_to_few_shapes(monkeypatch):
    sizes = []
    product = packed._product
    monkeypatch.setattr(packed, "_product", lambda rows, *rest: (sizes.append(len(rows)), product(rows, *rest))[1])
    layer = pack(nn.Linear(4, 6))
    for rows in (3, 17, 32, 130):
        x = torch.randn(rows, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
    assert sizes == [4, 4, 32, 32, 32, 32, 144, 144]


def test_a_product_of_a_transposed_view():
    layer = nn.Linear(24, 40)
    x = torch.randn(24, 5).T
    torch.testing.assert_close(pack(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_only_linear_layers_are_replaced():
    module = nn.ModuleDict({"norm": nn.LayerNorm(4), "inner": nn.Sequential(nn.Linear(4, 4), nn.GELU())})
    norm = module["norm"]
    assert pack(module) is module
    assert module["norm"] is norm
    assert [type(child).__name__ for child in module["inner"]] == ["PackedLinear", "GELU"]


def test_large_weights_are_left_alone(monkeypatch):
    monkeypatch.setattr(packed, "_LARGEST", 4 * 16)
    assert can_pack([nn.Linear(4, 4, bias=False)], torch.float32)
    assert not can_pack([nn.Linear(4, 5, bias=False)], torch.float32)
    assert not can_pack([nn.Linear(2, 2)], torch.float64)
    assert not can_pack([nn.Linear(2, 2, device="meta")], torch.float32)


class Three(nn.Module):
    """Two layers that read the same, and one that reads what they make."""

    def __init__(self, *, bias):
        super().__init__()
        self.inner = nn.ModuleDict({"left": nn.Linear(24, 40, bias=bias), "right": nn.Linear(24, 16)})
        self.last = Conv1D(8, 40)

    def forward(self, x, twin=None):
        left, right = self.inner["left"](x), self.inner["right"](x if twin is None else twin)
        return self.last(left * right.sum(-1, keepdim=True))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_read_the_same_share_a_product(bias):
    torch.manual_seed(0)
    module, x = Three(bias=bias), torch.randn(3, 5, 24, requires_grad=True)
    groups = same_input([module, nn.Linear(2, 2)], lambda: module(x))
    assert groups == [[["inner.left", "inner.right"]], []]
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    found = pack(copy.deepcopy(module), groups[0])
    assert len({id(found.inner[name].shared) for name in ("left", "right")}) == 1
    up = torch.randn(3, 5, 8)
    for _ in range(2):
        wanted, got = module(x), found(x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
        gradients = [torch.autograd.grad(y, x, up)[0] for y in (wanted, got)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-4)
    twin = torch.randn(3, 5, 24)
    torch.testing.assert_close(found(x, twin), module(x, twin), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found(x), module(x), rtol=1e-5, atol=1e-4)


def test_a_product_is_let_go_once_all_have_their_part():
    module = Three(bias=True)
    found = pack(module, [["inner.left", "inner.right"]])
    x = torch.randn(2, 24)
    alive = weakref.ref(x)
    with torch.no_grad():
        found(x)
    del x
    assert alive() is None


def test_a_layer_that_reads_twice_shares_with_none():
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.randn(2, 4)
    assert same_input([module], lambda: [module[i](x) for i in (0, 1, 0)]) == [[]]


def test_a_layer_in_two_groups_shares_with_none():
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    module = nn.ModuleList([a, b, c])
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert same_input([module], lambda: (a(x), b(x), a(y), c(y))) == [[]]


def test_an_input_that_is_changed_between_two_layers_is_read_anew():
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.randn(2, 4)
    assert same_input([module], lambda: (module[0](x), x.mul_(2), module[1](x))) == [[]]
    wanted = module[0](x), module[1](x * 2)
    found = pack(module, [["0", "1"]])
    with torch.no_grad():
        got = found[0](x), found[1](x.mul_(2))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_part_without_gradients_is_not_handed_on_to_where_they_are_wanted():
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    found, x = pack(module, [["0", "1"]]), torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        found[0](x)
    assert found[1](x).requires_grad


def test_tensors_of_inference_mode_are_read_as_well():
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with torch.inference_mode():
        x = torch.randn(2, 4)
        wanted = [layer(x) for layer in module]
        assert same_input([module], lambda: [layer(x) for layer in module]) == [[["0", "1"]]]
        found = pack(module, [["0", "1"]])
        torch.testing.assert_close([found[0](x), found[1](x)], wanted, rtol=1e-5, atol=1e-5)


def test_an_input_given_by_name_is_no_ones_else():
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.randn(2, 4)
    assert same_input([module], lambda: [layer(input=x) for layer in module]) == [[]]
    wanted = module[0](x)
    torch.testing.assert_close(pack(module)[0](input=x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["hook", "method"])
def test_a_layer_that_does_more_than_its_product_is_left_alone(how):
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    if how == "hook":
        layers[0].register_forward_hook(lambda _m, _i, output: output * 5)
    else:
        layers[0].forward = lambda x: x * 5
    x = torch.randn(2, 4)
    assert same_input([layers], lambda: [layer(x) for layer in layers]) == [[]]
    wanted = layers[0](x)
    assert torch.equal(pack(layers)[0](x), wanted)


GATED = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
PARALLEL = [["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"]]


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", GATED), ("qwen3", GATED), ("gemma3", GATED), ("gptj", PARALLEL), ("gpt2", [])]
)
def test_what_shares_an_input_in_a_family(family, expected):
    adapter = tiny_models.adapter(family)
    blocks = list(adapter.blocks)
    found = same_input(blocks, lambda: adapter.backbone(input_ids=torch.tensor([[3]])))
    assert [[sorted(group) for group in groups] for groups in found] == [[*map(sorted, expected)]] * len(blocks)
