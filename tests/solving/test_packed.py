"""Packed linear layers against plain ones."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rect_lightning.solving import packed
from rect_lightning.solving.packed import can_pack, pack


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
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24)])
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
