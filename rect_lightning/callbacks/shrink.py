"""Plain shrinkage of an update as a Lightning callback: the control for all that leave less of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rect_lightning.callbacks.changes import Change, relative, replace
from rect_lightning.callbacks.regulariser import Regulariser, check_share
from rect_lightning.solving.relative_change import largest
from rect_lightning.solving.spectrum import frobenius_norm


class Shrink(Regulariser):
    """Multiply the whole of each update by one factor.

    A method that leaves less of an update does less, in good and in bad: what it gains over plain shrinkage to the same norm
    is its own.

    Args:
        factor: The factor, above 0 and up to 1.
        like_rect: Instead of it, a share ``keep`` of `RECT`: shrink each tensor's update to the Frobenius norm that RECT would
            leave of it.
        **options: See `Regulariser`. With ``scope: run`` each step shrinks the whole change so far once more, unless a
            ``start_step`` beyond the run leaves that to the end.

    Raises:
        ValueError: Both are given or none is, or one is no share.
    """

    own_options = ("factor", "like_rect")
    repeatable = False

    def __init__(self, factor: float | None = None, *, like_rect: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        given = {name: x for name, x in {"factor": factor, "like_rect": like_rect}.items() if x is not None}
        if len(given) != 1:
            raise ValueError(f"Shrink takes either a factor or like_rect; got factor={factor}, like_rect={like_rect}.")
        check_share(self, **given)
        self.factor, self.like_rect = factor, like_rect

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Shrink, and tell by what factor."""
        logs: dict[str, float] = {}
        for change in changes:
            update = change.update
            factor = self.factor or _rect_factor(change, update, self.like_rect or 1.0)
            logs |= replace(change, update, update * factor)
        return logs


def _rect_factor(change: Change, update: Tensor, keep: float) -> float:
    """‖what RECT would leave‖ / ‖update‖."""
    mask = largest(relative(change), keep)
    return frobenius_norm(update.masked_fill(~mask, 0)) / (frobenius_norm(update) or 1.0)
