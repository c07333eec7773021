"""Means and standard deviations of all that has come so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class RunningStatistics:
    """Statistics of rows, which add up: those of two parts are those of the whole (Chan et al. 1979).

    Attributes:
        count: How many rows, ``[]`` float64.
        mean: ``[width]`` float64.
        squares: Sum of squared deviations from the mean, ``[width]`` float64.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> RunningStatistics:
        """The statistics of rows ``[count, width]``, at least one."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        return cls(torch.tensor(float(len(rows)), dtype=torch.float64), mean, (rows - mean).square().sum(dim=0))

    def __add__(self, other: RunningStatistics) -> RunningStatistics:
        count = self.count + other.count
        apart = other.mean - self.mean
        return RunningStatistics(
            count=count,
            mean=self.mean + apart * other.count / count,
            squares=self.squares + other.squares + apart.square() * self.count * other.count / count,
        )

    def normalise(self, rows: Tensor) -> Tensor:
        """Rows less the mean, over the standard deviation; float64, and zero where nothing has ever varied."""
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows.double() - self.mean) / (deviation + _EPSILON)
