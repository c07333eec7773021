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
        count: How many rows, ``[]``, in the rows' dtype like the others.
        mean: ``[width]``.
        squares: Sum of squared deviations from the mean, ``[width]``.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, width: int) -> RunningStatistics:
        """Those of no rows, to which others can be added."""
        return cls(torch.zeros(()), torch.zeros(width), torch.zeros(width))

    @classmethod
    def of(cls, rows: Tensor) -> RunningStatistics:
        """The statistics of rows ``[count, width]``, at least one."""
        mean = rows.mean(dim=0)
        return cls(rows.new_tensor(float(len(rows))), mean, (rows - mean).square().sum(dim=0))

    def __add__(self, other: RunningStatistics) -> RunningStatistics:
        count = self.count + other.count
        apart = other.mean - self.mean
        return RunningStatistics(
            count=count,
            mean=self.mean + apart * other.count / count,
            squares=self.squares + other.squares + apart.square() * self.count * other.count / count,
        )

    def normalise(self, rows: Tensor) -> Tensor:
        """Rows less the mean, over the standard deviation, which takes two rows; zero where nothing has ever varied."""
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows - self.mean) / (deviation + _EPSILON)
