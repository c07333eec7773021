"""RECT (Gu et al. 2024) as a Lightning callback."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from rect_lightning.callbacks.changes import Change, relative
from rect_lightning.callbacks.regulariser import Regulariser, check_share
from rect_lightning.solving.change_profile import smallest_kept
from rect_lightning.solving.relative_change import change_statistics, largest, largest_of_all


class RECT(Regulariser):
    """Keep the entries of each update with the largest relative change ``|ΔW / W|``, and undo the others.

    Works in any LightningModule under any optimizer and precision; how, `Regulariser` says. Definition and source:
    `rect_lightning.solving.relative_change`.

    By default, for each step and each tensor, against the weight before the step. With ``scope: run`` the change since the
    start of the run is held to its top k % after each step, so that after training exactly ``round(keep · N)`` entries of each
    tensor differ from the start, or all that moved if these are fewer.

    A weight of zero has an infinitely large relative change. Tensors that start at zero, such as many biases or LoRA's B, have
    nothing but such, and position decides between them: leave them out by ``parameters`` or ``modules``.

    Gradient clipping comes after the gradients of plain SGD are masked: the norm is that of what is left, and clipping by value
    acts on entries chosen without it. Under other optimizers the change is compared as it is after all that.

    Args:
        keep: Share of the entries to keep, above 0 and up to 1. The paper recommends 0.4.
        per: tensor keeps this share of each tensor; all of the entries of all chosen tensors together, by one threshold. In a
            step, these are the tensors that move in it.
        thresholds: Values of δ of which to log the share of entries above, before masking. The paper's table shows these.
        **options: See `Regulariser`.

    Raises:
        ValueError: keep is no share.
    """

    own_options = ("keep", "per")

    def __init__(
        self,
        keep: float = 0.4,
        *,
        per: Literal["tensor", "all"] = "tensor",
        thresholds: tuple[float, ...] = (0.077, 0.171),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_share(self, keep=keep)
        if per not in ("tensor", "all"):
            raise ValueError(f"per is tensor or all; got {per!r}.")
        self.keep, self.per, self.thresholds = keep, per, list(thresholds)

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Mask, and tell what each change was and what share of its entries is kept."""
        masks: list[Tensor] | None = None
        if self.per == "all":
            # computed again rather than held: δ of a whole model is as large as the model
            masks = largest_of_all(lambda i: relative(changes[i]), [c.before.numel() for c in changes], self.keep)
        logs: dict[str, float] = {}
        for i, change in enumerate(changes):
            update = change.update
            delta = relative(change)
            statistics = change_statistics(update, delta, self.thresholds)
            statistics["manhattan"] *= abs(change.scale)
            mask = largest(delta, self.keep) if masks is None else masks[i].view(delta.shape)
            statistics["kept"] = int(mask.count_nonzero()) / mask.numel()
            statistics["threshold"] = smallest_kept(delta, mask)
            change.keep(mask)
            logs |= {f"{change.name}/{key}": value for key, value in statistics.items()}
        return logs
