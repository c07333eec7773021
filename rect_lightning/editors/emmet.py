"""EMMET (Gupta et al. 2024, "A Unified Framework for Model Editing", arXiv 2403.14236)."""

from typing import Any

from torch import Tensor

from rect_lightning.editors.spread import SpreadOverLayers
from rect_lightning.solving.solvers import equality_constrained


class EMMET(SpreadOverLayers):
    """Edits of many requests at once that each key is to meet exactly: ROME's constraint for a batch.

    Of all updates with ``ΔW K = R`` the one that changes preserved keys the least, ``ΔW = R (Kᵀ C⁻¹ K + ridge · I)⁻¹ Kᵀ C⁻¹``.
    With a ridge it is what MEMIT gives with ``λ = ridge`` (Woodbury), with 0 the constraint holds.

    The authors edit one layer. Their code multiplies C by a ``mom2_update_weight`` first, which is a ridge as many times as
    large, and leaves the ridge out where a batch has one request.

    Args:
        ridge: Added to the diagonal of ``Kᵀ C⁻¹ K``, since keys that are much alike make it nearly singular; 0 for
            exact equality.
        **kwargs: See `LocateThenEdit` and `Editor`.

    Raises:
        ValueError: There are no moments, or the ridge is negative.
    """

    def __init__(self, *, ridge: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ridge >= 0:
            raise ValueError(f"ridge must not be negative; got {ridge}.")
        self.ridge = ridge

    def solve(self, layer: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """``R (Kᵀ C⁻¹ K + ridge · I)⁻¹ Kᵀ C⁻¹``."""
        return equality_constrained(residuals, keys, self.factors[layer], self.ridge)
