"""A limit on how far weights move, as a Lightning callback."""

from collections.abc import Sequence
from typing import Any

from rect_lightning.callbacks.changes import Change, replace
from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.solving.spectrum import frobenius_norm


class FrobeniusNorm(Regulariser):
    """Project each update on the ball ``‖ΔW‖_F ≤ limit · ‖W‖_F``: one that is longer is scaled down to it.

    W is the weight that the change starts from: the one before each step or, with ``scope: run``, that before the run, so that
    all edits together stay within the limit.

    Args:
        limit: The radius, above 0.
        relative: Whether it is a multiple of the weight's own norm. Tensors that start at zero, such as many biases, could then
            never move: leave them out by ``parameters`` or ``modules``.
        **options: See `Regulariser`.

    Raises:
        ValueError: The limit is not positive.
    """

    own_options = ("limit", "relative")
    repeatable = False

    def __init__(self, limit: float, *, relative: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if not limit > 0:
            raise ValueError(f"FrobeniusNorm's limit must be positive; got {limit}.")
        self.limit, self.relative = limit, relative

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Scale down what is too long, and tell by what factor."""
        logs: dict[str, float] = {}
        for change in changes:
            update = change.update
            norm = frobenius_norm(update) * abs(change.scale)
            radius = self.limit * (frobenius_norm(change.before) if self.relative else 1.0)
            logs |= replace(change, update, update * (radius / norm)) if norm > radius else {f"{change.name}/norm": 1.0}
        return logs
