"""The PCA control of RECT (Gu et al. 2024) as a Lightning callback."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rect_lightning.callbacks.changes import Change, replace
from rect_lightning.callbacks.regulariser import Regulariser, check_share
from rect_lightning.solving.spectrum import along, frobenius_norm, principal_directions


class PCA(Regulariser):
    """Project each update on its leading principal components: ``U_r diag(S_r) V_rᵀ`` of ``ΔW = U diag(S) Vᵀ``.

    No mean is subtracted: an update has no mean that would be worth more than its other entries.

    A rank-one update, such as ROME's, is its own leading component and left as it is, whatever the share. The "PCA 40" of the
    RECT paper is something else. In its public code, a count of components by ``of: dimension`` (320 of 1600 as published) is
    fitted by scikit-learn, which subtracts the mean of each column, and the *scores* ``U_r S_r`` are written in the first r
    columns of a matrix of zeros. They are not turned back by ``V_rᵀ``, so the columns no longer mean the dimensions of the
    weight, and what is added is as large as the update but points elsewhere: this is why it loses the edits there.

    Args:
        keep: Share of what ``of`` says, above 0 and up to 1; at least one component is left.
        of: rank counts components among those that the update has, ``round(keep · rank)``; dimension among all that its shape
            allows, ``round(keep · min(out, in))``, as the public code does, which leaves updates of lower rank as they are;
            energy takes the fewest that hold at least this share of the update's squared Frobenius norm. What is no matrix is
            left as it is.
        **options: See `Regulariser`. With ``scope: run``, rank and energy take their share of what the last step left.

    Raises:
        ValueError: keep is no share.
    """

    own_options = ("keep", "of")

    def __init__(
        self, keep: float = 0.4, *, of: Literal["rank", "dimension", "energy"] = "rank", **options: Any
    ) -> None:
        super().__init__(**options)
        check_share(self, keep=keep)
        if of not in ("rank", "dimension", "energy"):
            raise ValueError(f"of is rank, dimension or energy; got {of!r}.")
        self.keep, self.of = keep, of
        self.repeatable = of == "dimension"

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Project, and tell how many components are left and what share of the norm."""
        logs: dict[str, float] = {}
        for change in changes:
            update = change.update
            if update.ndim != 2:
                continue
            singular, directions = principal_directions(update)
            count = self._count(singular, change, update)
            logs[f"{change.name}/components"] = count
            logs |= replace(change, update, along(update, directions[:, :count]).to(update.dtype))
        return logs

    def _count(self, singular: Tensor, change: Change, update: Tensor) -> int:
        if self.of == "energy":
            # how many leading ones hold less than the share, and one more
            cumulated = singular.square().cumsum(0)
            return min(int((cumulated < self.keep * cumulated[-1]).sum()) + 1, len(singular))
        if self.of == "dimension":
            return max(1, round(self.keep * len(singular)))
        return max(1, round(self.keep * _rank(singular, change, update)))


def _rank(singular: Tensor, change: Change, update: Tensor) -> int:
    """As torch.linalg.matrix_rank, but not counting what the rounding of the weight makes: noise of about this norm."""
    m, n = update.shape
    rounding = torch.finfo(change.before.dtype).eps * frobenius_norm(change.before) * (m**-0.5 + n**-0.5)
    tolerance = max(m, n) * torch.finfo(update.dtype).eps * float(singular[0])
    return int((singular > max(tolerance, rounding / (abs(change.scale) or 1.0))).sum())
