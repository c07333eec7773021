import subprocess
import sys

import pytest
import torch
from torch import nn

from rect_lightning.models.fingerprint import weights_fingerprint


class Tied(nn.Module):
    def __init__(self, reverse=False, tie=True):
        super().__init__()
        modules = {"embed": nn.Embedding(7, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 7, bias=False)}
        for name in reversed(modules) if reverse else modules:
            self.add_module(name, modules[name])
        with torch.no_grad():
            for name, parameter in sorted(self.named_parameters()):
                parameter.copy_(torch.linspace(-1, len(name), parameter.numel()).view_as(parameter))
        if tie:
            self.head.weight = self.embed.weight


def test_is_a_sha256_that_does_not_depend_on_the_process():
    code = "from tests.models.test_fingerprint import Tied, weights_fingerprint as f; print(f(Tied()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert weights_fingerprint(Tied()) == other
    assert len(other) == 64
    assert set(other) <= set("0123456789abcdef")


def test_parameter_order_and_memory_layout_do_not_matter():
    model = Tied()
    expected = weights_fingerprint(model)
    assert weights_fingerprint(Tied(reverse=True)) == expected
    model.embed.weight.data = model.embed.weight.data.t().contiguous().t()
    assert not model.embed.weight.is_contiguous()
    assert weights_fingerprint(model) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_entry_counts(dtype):
    model = Tied().to(dtype)
    seen = {weights_fingerprint(model)}
    parameters = list(model.parameters())
    for parameter in parameters:
        flat = parameter.data.view(-1)
        for i in range(flat.numel()):
            before = flat[i].clone()
            flat[i] = before + 0.5
            seen.add(weights_fingerprint(model))
            flat[i] = before
    assert len(seen) == 1 + sum(p.numel() for p in parameters)


def test_the_last_bit_counts():
    model = Tied()
    before = weights_fingerprint(model)
    model.norm.bias.data[2] = torch.nextafter(model.norm.bias.data[2], torch.tensor(9.0))
    assert weights_fingerprint(model) != before


def test_dtype_name_shape_and_buffers_count():
    def holder(name, tensor, *, buffer=False):
        module = nn.Module()
        if buffer:
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return weights_fingerprint(module)

    zeros = torch.zeros(6)
    different = [
        holder("a", zeros),
        holder("b", zeros),
        holder("a", zeros.view(2, 3)),
        holder("a", zeros.view(3, 2)),
        holder("a", zeros.int()),
        holder("a", torch.zeros(12, dtype=torch.bfloat16)),
        holder("a", torch.ones(6), buffer=True),
    ]
    assert len(set(different)) == len(different)
    assert holder("scalar", torch.tensor(1.0)) != holder("scalar", torch.tensor(2.0))


def test_two_swapped_tensors_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = weights_fingerprint(model)
    model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data
    assert weights_fingerprint(model) != before


def test_tied_weights_are_hashed_once(monkeypatch):
    import rect_lightning.models.fingerprint as module

    hashed = []
    digest = module.tensor_digest
    monkeypatch.setattr(module, "tensor_digest", lambda name, tensor: (hashed.append(name), digest(name, tensor))[1])
    weights_fingerprint(Tied())
    assert sorted(hashed) == ["embed.weight", "norm.bias", "norm.weight"]
    hashed.clear()
    weights_fingerprint(Tied(tie=False))
    assert "head.weight" in hashed


def test_does_not_change_the_model():
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights_fingerprint(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_weights_without_values():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"bias is on the meta device"):
        weights_fingerprint(model)
