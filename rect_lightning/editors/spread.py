"""What MEMIT, EMMET and AlphaEdit share: the lack at the last edited layer is spread over all of them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.locate_then_edit import LocateThenEdit
from rect_lightning.solving.keys import SubjectStates
from rect_lightning.solving.values import TargetValues


class SpreadOverLayers(LocateThenEdit):
    """Edits of many requests at once, layer by layer, by a method that adds `solve`.

    Each layer takes an equal share of the residual, which is what still lacks to the target values at the last edited
    layer, and is recomputed after each layer (Meng et al. 2023, MEMIT, eq. 20).

    Args:
        **kwargs: See `LocateThenEdit` and `Editor`.

    Raises:
        ValueError: There are no moments.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.moments is None:
            raise ValueError(f"{type(self).__name__} needs second moments: give `moments` a source.")

    @abstractmethod
    def solve(self, layer: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """The update ``[out, in]`` of a layer, from residuals ``[requests, out]`` and keys ``[requests, in]``."""

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: TargetValues) -> Tensor:
        """This layer's share of the update, ``[out, in]``."""
        last = self.layers[-1]
        model = self.model
        keys, states = self.request_keys(layer, requests)
        target = state.stream + model.stream_change(last, state.value, state.offset)
        now = self.states(last, requests, self.templates[:1]).stream
        residual = (target - now) / (len(self.layers) - self.layers.index(layer))
        change = model.value_change(layer, states.value[:: len(self.templates)], residual)
        return self.solve(layer, change, keys)

    def request_keys(self, layer: int, requests: Sequence[EditRequest]) -> tuple[Tensor, SubjectStates]:
        """Keys as the model stands now, ``[requests, in]``, and the states of all templates that they come from.

        The bare prompt counts as much as all prefixes together, as in the authors' code.
        """
        n = len(self.templates)
        weights = torch.full((n,), 0.5 / max(n - 1, 1))
        weights[0] = 0.5 if n > 1 else 1.0
        return self.mean_keys(layer, requests, weights)
