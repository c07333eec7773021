"""ROME (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"), and R-ROME."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.locate_then_edit import LocateThenEdit
from rect_lightning.solving.solvers import rank_one
from rect_lightning.solving.values import TargetValues


class ROME(LocateThenEdit):
    """Rank-one editing of one layer, one request at a time.

    ``W += (v* − W k) uᵀ / (uᵀ k)`` with ``u = C⁻¹ k*``, where ``k*`` is the mean key over the prefixes. The original takes the
    bare prompt's key for ``k``; R-ROME (Gupta et al. 2024, arXiv 2403.07175) takes ``k*`` there as well, which prevents the
    rare edits that disable the model.

    Without C (``moments: null``) ``u`` is ``k*`` itself, as the RECT paper ran it.

    Args:
        key: bare as in the original, mean for R-ROME.
        **kwargs: See `LocateThenEdit` and `Editor`.

    Raises:
        ValueError: More than one layer is given.
    """

    relative_to = "value"

    def __init__(self, *, key: Literal["bare", "mean"] = "bare", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(self.layers) != 1:
            raise ValueError(f"ROME edits one layer; got layers {self.layers}. MEMIT edits several.")
        self.key = key

    def setup(self, stage: str) -> None:
        """Refuse batches of several requests, before anything is loaded."""
        super().setup(stage)
        if stage == "fit":
            _check_one(getattr(self.data_module, "batch_size", 1))

    def begin(self, requests: Sequence[EditRequest]) -> TargetValues:
        """Search for the request's target value.

        Raises:
            ValueError: There are several requests.
        """
        _check_one(len(requests))
        return super().begin(requests)

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: TargetValues) -> Tensor:
        """The rank-one update, ``[out, in]``."""
        n = len(self.templates)
        mean, states = self.mean_keys(layer, requests, torch.full((n,), 1 / n))
        mean_key = mean[0]
        u = self.factors[layer].solve(mean_key[:, None])[:, 0] if self.factors else mean_key
        target = (state.value + state.offset)[0]
        if self.key == "bare":
            return rank_one(target - states.value[0], u, states.key[0])
        # the layer is linear, so the mean of its outputs is its output for the mean key
        return rank_one(target - states.value.mean(0), u, mean_key)


def _check_one(requests: int) -> None:
    if requests != 1:
        raise ValueError(
            f"ROME edits one request at a time and got {requests}: set data.batch_size to 1, or use MEMIT."
        )
