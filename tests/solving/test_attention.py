"""Grouped attention against its definition, head by head."""

import math

import pytest
import torch

from rect_lightning.solving.attention import grouped_attention


def naive(query, key, value, mask, scaling, softcap):
    """One row and one head at a time, in float64."""
    rows, heads, _, size = query.shape
    shared = heads // key.shape[1]
    found = []
    for row in range(rows):
        for head in range(heads):
            scores = query[row, head] @ key[row, head // shared].T
            scores = scores * (1 / math.sqrt(size) if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                scores = scores + mask[row if len(mask) > 1 else 0, 0]
            found.append(scores.softmax(-1) @ value[row, head // shared])
    return torch.stack(found).view(query.shape).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.3, 2.0)])
@pytest.mark.parametrize("masks", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_as_head_by_head(groups, scaling, softcap, masks, dtype):
    torch.manual_seed(0)
    query = torch.randn(3, 4, 6, 8).transpose(1, 2)  # not contiguous, as a model gives it
    key, value = (torch.randn(3, groups, 7, 8) for _ in range(2))
    mask = torch.randn(masks, 1, 4, 7).to(dtype) if masks else None
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found, _ = grouped_attention(torch.nn.Identity(), *leaves, mask, scaling=scaling, softcap=softcap, dropout=0.0)
    expected = naive(*wide, None if mask is None else mask.double(), scaling, softcap)
    close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # the softmax is in fp32
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    up = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, leaves, up.to(dtype))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, wide, up), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=5 * close, atol=5 * close)
