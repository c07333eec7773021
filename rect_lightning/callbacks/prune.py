"""PRUNE (Ma et al. 2024) as a Lightning callback."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

from rect_lightning.callbacks.changes import Change, replace
from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.solving.spectrum import along, frobenius_norm, principal_directions, spectral_norm


class PRUNE(Regulariser):
    """Restrain the singular values of the whole change that exceed the largest one of the weight before the run.

    Ma et al., "Perturbation-Restrained Sequential Model Editing" (ICLR 2025, arXiv 2405.16821), section 4: with the change
    ``ΔW = U diag(σ) Vᵀ`` of all edits together and ``s`` the largest singular value of the weight W₀ that they started from,

        σ ← log_b σ − log_b s + s    where σ > s

    and the edited weight is ``W₀ + U diag(σ) Vᵀ``: added to W₀, not to what is edited already. Where ``s · ln b < 1`` the
    formula would enlarge values just above s; here none is enlarged. What is no matrix is left as it is.

    As in the paper, this is done once, when the run ends; checkpoints and validations before that are unrestrained. Going on
    from a run that was ended, as by ``max_steps``, restrains what was restrained then once more, with a warning.
    With a ``start_step``, it is done after each step from then on: what is restrained counts on, and is restrained again while
    it exceeds s.

    Args:
        base: b, the base of the logarithm, above 1. The authors' code offers e, 1.5 and 1.2, which restrains less.
        scope: As the paper, the change of the whole run; step restrains the update of each step by itself.
        start_step: With ``scope: run``, null for when the run ends. Else see `Regulariser`.
        **options: See `Regulariser`.

    Raises:
        ValueError: The base is not above 1.
    """

    own_options = ("base",)
    repeatable = False

    def __init__(
        self,
        *,
        base: float = math.e,
        scope: Literal["step", "run"] = "run",
        start_step: int | None = None,
        **options: Any,
    ) -> None:
        at_the_end = scope == "run" and start_step is None
        super().__init__(scope=scope, start_step=sys.maxsize if at_the_end else start_step, **options)
        if not base > 1:
            raise ValueError(f"PRUNE's base is that of a logarithm that grows, above 1 such as 1.2; got {base}.")
        self.base = base

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Restrain, and tell how many singular values were, and what share of the norm is left."""
        logs: dict[str, float] = {}
        for change in changes:
            if change.before.ndim == 2:
                logs |= self._restrain(change)
        return logs

    def _restrain(self, change: Change) -> dict[str, float]:
        update, scale = change.update, abs(change.scale)
        norm = frobenius_norm(update) * scale
        unchanged = {f"{change.name}/restrained": 0.0, f"{change.name}/norm": 1.0}
        # norms bound singular values, which take far longer
        if norm <= frobenius_norm(change.before) / min(update.shape) ** 0.5:
            return unchanged
        largest = spectral_norm(change.before)
        if norm <= largest or not largest:
            return unchanged
        singular, directions = principal_directions(update)
        singular *= scale
        count = int((singular > largest).sum())
        over = singular[:count]
        allowed = largest + (over / largest).log() / math.log(self.base)
        factors = (allowed / over).clamp(max=1)
        left = update + along(update, directions[:, :count], factors - 1).to(update.dtype)
        return {f"{change.name}/restrained": float(count)} | replace(change, update, left)
