"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer")."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.locate_then_edit import LocateThenEdit
from rect_lightning.solving.solvers import least_squares
from rect_lightning.solving.values import TargetValues


class MEMIT(LocateThenEdit):
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
        if self.moments is None:
            raise ValueError("MEMIT needs second moments: give `moments` a source.")
        if moments_weight <= 0:
            raise ValueError(f"moments_weight must be positive; got {moments_weight}.")
        self.moments_weight = moments_weight

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: TargetValues) -> Tensor:
        """This layer's share of the update, ``[out, in]``."""
        last = self.layers[-1]
        model = self.model
        # the bare prompt counts as much as all sampled prefixes together, as in the authors' code
        n = len(self.templates)
        weights = torch.full((n,), 0.5 / max(n - 1, 1))
        weights[0] = 0.5 if n > 1 else 1.0
        keys, states = self.mean_keys(layer, requests, weights)
        target = state.stream + model.stream_change(last, state.value, state.offset)
        now = self.states(last, requests, self.templates[:1]).stream
        residual = (target - now) / (len(self.layers) - self.layers.index(layer))
        change = model.value_change(layer, states.value[::n], residual)
        return least_squares(change, keys, self.factors[layer], self.moments_weight)
