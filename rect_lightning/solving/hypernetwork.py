"""MEND's hypernetwork: from a fine-tuning gradient to an edit (Mitchell et al. 2022, arXiv 2110.11309, section 3).

A gradient is a sum of outer products, one a token, so a network that maps the factors ``[u; δ]`` of a token to others of the
same shape is small enough to be learned, where one that maps whole gradients is not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rect_lightning.solving.running_statistics import RunningStatistics


class Hypernetwork(nn.Module):
    """Maps the token gradients of some layers to those of an edit.

    ``ũ, δ̃ = g([û; δ̂])`` token by token, and ``ΔW = −α Σ δ̃ ũᵀ``, where û and δ̂ are u and δ less their running mean, over their
    running standard deviation. Layers of one shape share a network ``g``, with a scale and a shift of each layer's own.
    Statistics, and the edit learning rates ``α``, are each layer's own too. ``g`` starts as the identity.

    Args:
        shapes: ``(out, in)`` of each layer's weight.
        rank: Rank of the matrices in ``g``; one as large as out + in is cut to that.
        edit_lr: What each ``α`` starts at; its logarithm is learned, so it stays positive.
    """

    def __init__(self, shapes: Mapping[int, tuple[int, int]], *, rank: int, edit_lr: float) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.layers = list(shapes)
        layers_of = Counter(self.shapes.values())
        self.networks = nn.ModuleDict(
            {_name(shape): _ResidualMLP(sum(shape), min(rank, sum(shape)), count) for shape, count in layers_of.items()}
        )
        self.norms = nn.ModuleDict({str(n): _RunningNorm(width + out) for n, (out, width) in self.shapes.items()})
        self.log_lr = nn.Parameter(torch.full((len(self.layers),), math.log(edit_lr)))

    def forward(self, layer: int, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the edit: ``ΔW = δ̃ᵀ ũ``, with ``−α`` in δ̃.

        In train mode the tokens first count in the running statistics.

        Args:
            layer: The layer.
            u: Inputs of its tokens, ``[tokens, in]``.
            delta: Gradients by its outputs, ``[tokens, out]``.

        Raises:
            ValueError: There have been too few tokens to know how much they vary.
        """
        shape = self.shapes[layer]
        same = [n for n in self.layers if self.shapes[n] == shape]
        normalised = self.norms[str(layer)](torch.cat([u, delta], dim=-1))
        out = self.networks[_name(shape)](normalised, same.index(layer))
        u, delta = out.split([shape[1], shape[0]], dim=-1)
        return u, -self.log_lr[self.layers.index(layer)].exp() * delta


class _ResidualMLP(nn.Module):
    """Two low-rank layers, each added to its input."""

    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__()
        self.first = _LowRankLayer(width, rank, layers)
        self.second = _LowRankLayer(width, rank, layers)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.first(x, layer)
        out: Tensor = self.second(x, layer)
        return out


class _LowRankLayer(nn.Module):
    """``x + max(0, s ⊙ (U V x + b) + o)``, with a scale s and a shift o for each layer that shares it."""

    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__()
        self.v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width)))
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        change = self.scale[layer] * (x @ self.v.T @ self.u.T + self.bias) + self.shift[layer]
        # not relu: it has no gradient at zero, where all begins
        return x + change.clamp(min=0)


class _RunningNorm(nn.Module):
    """Less the mean, over the standard deviation, of all rows that were seen in train mode."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in vars(RunningStatistics.none(width)).items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        statistics = RunningStatistics(self.count, self.mean, self.squares)
        if self.training and len(x):
            statistics += RunningStatistics.of(x.detach())
            for name, value in vars(statistics).items():
                self.get_buffer(name).copy_(value)
        if statistics.count < 2:
            raise ValueError("A hypernetwork that has seen fewer than two tokens cannot normalise: train it first.")
        return statistics.normalise(x)


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
