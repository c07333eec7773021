"""The change of one weight, as a regulariser sees it and says what is to be left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rect_lightning.solving.relative_change import relative_change
from rect_lightning.solving.spectrum import frobenius_norm


class Change(Protocol):
    """The change of one weight: ``scale · update``, starting from ``before``.

    ``update`` may be computed anew at each access: take it once.
    """

    @property
    def name(self) -> str:
        """The parameter's name in the LightningModule."""

    @property
    def before(self) -> Tensor:
        """The weight before the change, to be read only."""

    @property
    def update(self) -> Tensor:
        """The change up to its scale, in the weight's shape, to be read only."""

    @property
    def scale(self) -> float:
        """What the update is multiplied by: -lr where it is a gradient, lr where that is to be maximised, else 1."""

    def keep(self, mask: Tensor) -> None:
        """Leave the entries of the bool mask as they are, bit for bit, and undo all others. The mask is used up."""

    def replace(self, update: Tensor) -> None:
        """Make this the update instead."""


@dataclass(frozen=True)
class GradientChange:
    """What plain SGD is about to do: ``±lr`` times the gradient, so that a masked gradient is a masked change."""

    name: str
    before: Tensor
    update: Tensor
    """The gradient itself."""
    scale: float

    def keep(self, mask: Tensor) -> None:
        """Zero the other entries of the gradient."""
        self.update.masked_fill_(mask.logical_not_(), 0)  # a product with a mask would first make a float copy of it

    def replace(self, update: Tensor) -> None:
        """Overwrite the gradient."""
        self.update.copy_(update)


@dataclass(frozen=True)
class WeightChange:
    """What has been done to a weight, by one step or several, against a copy from before."""

    name: str
    before: Tensor
    weight: Tensor
    scale: float = 1.0

    @property
    def update(self) -> Tensor:
        """Weight minus copy, in at least fp32."""
        return self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32)) - self.before

    def keep(self, mask: Tensor) -> None:
        """Put the other entries back."""
        self.weight.copy_(torch.where(mask, self.weight, self.before))

    def replace(self, update: Tensor) -> None:
        """Move the weight by the update from where it was."""
        self.weight.copy_(self.before + update)


def relative(change: Change) -> Tensor:
    """The relative change ``|ΔW / W|`` of a weight's entries, see `rect_lightning.solving.relative_change`."""
    delta = relative_change(change.update, change.before)
    if not change.scale:  # no change, not even of a zero weight: not inf times 0
        return delta.zero_()
    return delta.mul_(abs(change.scale))  # after the division, which needs no further copy of the matrix


def replace(change: Change, update: Tensor, left: Tensor) -> dict[str, float]:
    """Leave this of the update, and tell what share of its Frobenius norm that is."""
    whole = frobenius_norm(update)
    change.replace(left)
    return {f"{change.name}/norm": frobenius_norm(left) / whole if whole else 1.0}
