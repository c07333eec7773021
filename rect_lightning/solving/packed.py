"""Frozen linear layers with weights laid out for oneDNN: on a CPU the same products, faster.

A library's matrix product begins by copying the weight into blocks that suit the processor. Frozen weights can be copied
once. The fewer rows the products have, the more that gains: 1.1 to 1.4 times as fast at 1,024 rows in fp32, where PyTorch
otherwise takes MKL, and 2 to 4 times at 8 rows, where reading the weight is nearly all of the work. Layers that read the same
tensor, as those of queries, keys and values do, become one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEP = 16
"""Products of more rows have a multiple of so many."""
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


def same_input(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[list[list[str]]]:
    """For each module the names of its linear layers, in groups that read one and the same tensor when ``run`` runs them."""
    # by module, tensor and its version, which tells what is changed in place; with the tensors, so that no other gets the id
    read: dict[tuple[int, int, int], tuple[Tensor, list[str]]] = {}

    def note(number: int, name: str, args: tuple[Any, ...]) -> None:
        for x in args[:1]:  # none where the input is given by name
            read.setdefault((number, id(x), _version(x)), (x, []))[1].append(name)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name, number=number: note(number, name, args))
        for number, module in enumerate(modules)
        for name, layer in module.named_modules()
        if name and _can_be_packed(layer)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    times = Counter((number, name) for (number, *_), (_, names) in read.items() for name in names)
    groups: list[list[list[str]]] = [[] for _ in modules]
    for (number, *_), (_, names) in read.items():
        once = [name for name in names if times[number, name] == 1]
        if len(once) > 1:
            groups[number].append(once)
    return groups


def pack(module: nn.Module, together: Sequence[Sequence[str]] = ()) -> nn.Module:
    """The module with its ``Linear`` and ``Conv1D`` layers replaced, in place; what to use instead of it.

    Args:
        module: The module.
        together: Names of layers that read the same tensor, group by group: one product serves a group.
    """
    for names in together:
        shared = _Shared([_weight_and_bias(module.get_submodule(name)) for name in names])
        for number, name in enumerate(names):
            module.set_submodule(name, _Part(shared, number))
    if _can_be_packed(module):
        return PackedLinear(*_weight_and_bias(module))
    for name, child in module.named_children():
        setattr(module, name, pack(child))
    return module


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; those made in inference mode do not know."""
    return -1 if x.is_inference() else x._version


def _can_be_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer and does nothing else."""
    from transformers.pytorch_utils import Conv1D

    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in (nn.Linear, Conv1D) and not hooked


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T, layer.bias


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

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        result: Tensor = _Product.apply(input, self.forwards, self.backwards, self.bias)
        return result


class _Shared:
    """Layers that read the same tensor, as one product: taken for the first of them, handed out to all, and let go."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
        bias = torch.cat(biases) if any(bias is not None for _, bias in layers) else None
        self.product = PackedLinear(torch.cat([weight.detach() for weight, _ in layers]), bias)
        self.sizes = [len(weight) for weight, _ in layers]
        self.x: tuple[Tensor, int, bool] | None = None  # and its version, and whether gradients are wanted
        self.parts: dict[int, Tensor] = {}

    def part(self, number: int, x: Tensor) -> Tensor:
        """``[..., in]`` to what the layer of this number makes of it, ``[..., out]``."""
        now = x, _version(x), torch.is_grad_enabled()
        if self.x is None or x is not self.x[0] or now[1:] != self.x[1:] or number not in self.parts:
            self.x, self.parts = now, dict(enumerate(self.product(x).split(self.sizes, dim=-1)))
        part = self.parts.pop(number)
        if not self.parts:
            self.x = None
        return part


class _Part(nn.Module):
    def __init__(self, shared: _Shared, number: int) -> None:
        super().__init__()
        self.shared, self.number = shared, number

    def forward(self, input: Tensor) -> Tensor:
        return self.shared.part(self.number, input)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backwards = backwards
        return _linear(x, forwards, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(gradient, ctx.backwards, None), None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    more = recurring(count) - count
    rows = F.pad(rows, (0, 0, 0, more)) if more else rows.contiguous()
    product = _product(rows, weight, bias)
    return product[:count].view(*x.shape[:-1], product.shape[-1])


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ops: Any = torch.ops.mkldnn
    product: Tensor = ops._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def recurring(rows: int) -> int:
    """The next of the few numbers of rows that products have: not less, and an eighth more at most where there are many.

    For each new shape of a product oneDNN generates code, about a megabyte, and keeps it.
    """
    power = 1 << max(0, rows - 1).bit_length()
    step = min(power, max(_STEP, power // 16))
    return -(-rows // step) * step
