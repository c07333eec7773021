"""MEND's hypernetwork against its formulas, written out token by token in float64."""

import pytest
import torch

from rect_lightning.solving.hypernetwork import Hypernetwork

SHAPES = {3: (4, 6), 5: (4, 6), 8: (3, 5)}


def trained(**options):
    """A hypernetwork whose parameters are anything, and what it has seen of each layer."""
    network = Hypernetwork(SHAPES, **({"rank": 3, "edit_lr": 0.01} | options)).double()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    seen = {}
    for layer, (out, width) in SHAPES.items():
        parts = [(2 + 3 * torch.randn(n, width), 0.01 * torch.randn(n, out)) for n in (7, 1, 12)]
        for u, delta in parts:
            network(layer, u.double(), delta.double())
        seen[layer] = [torch.cat(x).double() for x in zip(*parts, strict=True)]
    return network.eval(), seen


def naive_update(network, layer, us, deltas, seen):
    """``−α Σ δ̃ ũᵀ`` by loops over tokens."""
    of = {3: ("4x6", 0), 5: ("4x6", 1), 8: ("3x5", 0)}[layer]
    g, total = network.networks[of[0]], 0
    for u, delta in zip(us, deltas, strict=True):
        z = torch.cat([(x - s.mean(0)) / (s.std(0) + 2**-23) for x, s in zip((u, delta), seen, strict=True)])
        for part in (g.first, g.second):
            inner = part.u @ (part.v @ z) + part.bias
            z = z + torch.relu(part.scale[of[1]] * inner + part.shift[of[1]])
        total = total + torch.outer(z[len(u) :], z[: len(u)])
    return -network.log_lr[list(SHAPES).index(layer)].exp() * total


@pytest.mark.parametrize("layer", SHAPES)
def test_the_update_is_the_paper_s(layer):
    network, seen = trained()
    out, width = SHAPES[layer]
    u, delta = torch.randn(5, width).double(), 0.01 * torch.randn(5, out).double()
    new_u, new_delta = network(layer, u, delta)
    expected = naive_update(network, layer, u, delta, seen[layer])
    torch.testing.assert_close(new_delta.T @ new_u, expected, atol=1e-9, rtol=1e-5)


def test_layers_of_one_shape_share_all_but_scale_and_shift():
    network = Hypernetwork(SHAPES, rank=100, edit_lr=0.01)
    assert {name.split(".")[1] for name, _ in network.named_parameters() if "networks" in name} == {"4x6", "3x5"}
    assert network.networks["4x6"].first.scale.shape == (2, 10)
    assert network.networks["4x6"].first.v.shape == (10, 10), "a rank above the width is cut"


def test_it_starts_as_the_identity_and_can_learn():
    network = Hypernetwork(SHAPES, rank=3, edit_lr=0.01)
    u, delta = torch.randn(50, 6), torch.randn(50, 4)
    new_u, new_delta = network(3, u, delta)
    torch.testing.assert_close(new_u, (u - u.mean(0)) / u.std(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new_delta, -0.01 * (delta - delta.mean(0)) / delta.std(0), atol=1e-5, rtol=1e-4)
    (new_delta.T @ new_u).square().sum().backward()
    first = network.networks["4x6"].first
    assert all(parameter.grad.any() for parameter in (first.u, first.bias, first.shift, network.log_lr))


def test_statistics_stay_in_eval_mode_and_in_a_state_dict():
    network, _ = trained()
    state = {name: x.clone() for name, x in network.state_dict().items()}
    network(3, torch.randn(5, 6).double(), torch.randn(5, 4).double())
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in state.items())
    other = Hypernetwork(SHAPES, rank=3, edit_lr=1.0).double().eval()
    other.load_state_dict(state)
    u, delta = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    assert all(torch.equal(a, b) for a, b in zip(network(3, u, delta), other(3, u, delta), strict=True))


def test_untrained_it_refuses():
    with pytest.raises(ValueError, match="train it first"):
        Hypernetwork(SHAPES, rank=3, edit_lr=0.01).eval()(3, torch.randn(5, 6), torch.randn(5, 4))
