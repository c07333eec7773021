"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer")."""

from typing import Any

from torch import Tensor

from rect_lightning.editors.spread import SpreadOverLayers
from rect_lightning.solving.solvers import least_squares


class MEMIT(SpreadOverLayers):
    """Edits of many requests at once, spread over several layers.

    Layer by layer ``ΔW = (R / layers left) Kᵀ (λC + K Kᵀ)⁻¹``, where the residual ``R`` is what still lacks to the target
    values at the last edited layer, and is recomputed after each layer.

    Args:
        moments_weight: λ, the weight of the moments against the new keys: larger changes less.
        **kwargs: See `LocateThenEdit` and `Editor`.

    Raises:
        ValueError: There are no moments, or their weight is not positive.
    """

    def __init__(self, *, moments_weight: float = 15000.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if moments_weight <= 0:
            raise ValueError(f"moments_weight must be positive; got {moments_weight}.")
        self.moments_weight = moments_weight

    def solve(self, layer: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """``R Kᵀ (λC + K Kᵀ)⁻¹``."""
        return least_squares(residuals, keys, self.factors[layer], self.moments_weight)
