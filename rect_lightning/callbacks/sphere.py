"""SPHERE (Liu et al. 2025) as a Lightning callback."""

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from rect_lightning.callbacks.linear import LinearRegulariser
from rect_lightning.callbacks.regulariser import check_share
from rect_lightning.solving.spectrum import leading_inputs


class SPHERE(LinearRegulariser):
    """Suppress each update along the directions that the weight's neurons mostly point in.

    Liu et al., "Energy-Regularized Sequential Model Editing on Hyperspheres" (arXiv 2510.01172), as in the authors' code:

        ΔW ← ΔW (I − α U Uᵀ)

    where U are the leading eigenvectors, on the input side, of the mean of ``w wᵀ`` over the weight's rows w ``[in]``, one a
    neuron, each scaled to norm 1; the fewest that hold ``energy`` of its trace. The weight is that before each step or, with
    ``scope: run``, before the run, and ΔW then the change of all steps, which each step suppresses once more unless strength
    is 1. Layers that keep their weight as ``[in, out]`` are turned, so that a row is a neuron there too.

    Args:
        energy: Share of the trace, above 0 and up to 1: the "cumulative ratio", 0.5 as published.
        strength: α, above 0 and up to 1, which removes these directions from the update altogether; 0.5 as published.
        **options: See `Regulariser`.

    Raises:
        ValueError: One of them is no share.
    """

    own_options = ("energy", "strength")

    def __init__(self, *, energy: float = 0.5, strength: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        check_share(self, energy=energy, strength=strength)
        self.energy, self.strength = energy, strength

    def project(self, name: str, update: Tensor, before: Tensor) -> Tensor:
        """The update without this part of itself along the weight's leading directions."""
        directions = leading_inputs(normalize(before.double(), dim=1), self.energy)
        wide = update.double()
        return wide - self.strength * (wide @ directions) @ directions.T
