"""AlphaEdit (Fang et al. 2025, "Null-Space Constrained Knowledge Editing for Language Models", arXiv 2410.02355)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.spread import SpreadOverLayers
from rect_lightning.solving.null_space import null_space_projector
from rect_lightning.solving.solvers import null_space_least_squares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AlphaEdit(SpreadOverLayers):
    """Edits of many requests at once, in directions that hardly any key of ordinary text has, nor any edited before.

    Layer by layer ``ΔW = (R / layers left) Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L₂ I)⁻¹``, where P projects on the eigenvectors of C
    with small eigenvalues, and K_p are the keys of all operations before, each as the layers before it had been edited.

    Of K_p the sum ``P K_p K_pᵀ P`` is remembered, ``[in, in]`` a layer in float64, so an operation costs the same however
    many came before it; P takes as much memory. Checkpoints hold the sum, a failed operation leaves nothing in it, and single
    mode has no keys of the past. What a regulariser leaves of an update, such as a part of its entries, is not in the null
    space any more; and if it acts later than at each step (``scope: run``, ``every_n_steps``), it changes keys that are
    remembered already.

    Args:
        threshold: Eigenvalues of C below this count as small. The published 0.02 fits models whose keys are small; there
            must be eigenvalues on either side of it.
        energy: Instead of a threshold, the share of C's trace that the small eigenvalues may hold together.
        ridge: L₂, which keeps the update small: larger changes less.
        **kwargs: See `LocateThenEdit` and `Editor`.

    Raises:
        ValueError: There are no moments, or a number is out of range.
    """

    def __init__(
        self, *, threshold: float = 0.02, energy: float | None = None, ridge: float = 10.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not threshold > 0:
            raise ValueError(f"threshold must be positive; got {threshold}.")
        if energy is not None and not 0 < energy < 1:
            raise ValueError(f"energy is a share, above 0 and below 1; got {energy}.")
        if not ridge > 0:
            raise ValueError(f"ridge must be positive; got {ridge}.")
        self.threshold, self.energy, self.ridge = threshold, energy, ridge
        self.projectors: dict[int, Tensor] = {}

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Edit this model; what was computed for another one is forgotten."""
        super().attach(network, tokenizer)
        self.projectors = {}

    def take_moments(self, moments: dict[int, Tensor]) -> None:
        """The projector on each layer's null space."""
        for layer, c in moments.items():
            try:
                self.projectors[layer] = null_space_projector(c, threshold=self.threshold, energy=self.energy)
            except ValueError as error:
                raise ValueError(f"Layer {layer}: {error}") from error

    def solve(self, layer: int, residuals: Tensor, keys: Tensor) -> Tensor:
        """The update in the null space."""
        keys = self._projected(layer, keys)
        update = null_space_least_squares(residuals, keys, self.memory.get(f"past_keys.{layer}"), self.ridge)
        if self.step_per == "layer":  # the layers before this one have made theirs
            self._remember(layer, keys)
        return update

    def conclude(self, requests: Sequence[EditRequest]) -> None:
        """Read the keys that count as past ones from now on, where all layers have made their step at the end.

        A regulariser may have left less of each layer than stood there when the layers behind it were solved for.
        """
        if self.step_per == "operation" and self.mode == "sequential":
            for layer in self.layers:
                keys, _ = self.request_keys(layer, requests)
                self._remember(layer, self._projected(layer, keys))

    def _projected(self, layer: int, keys: Tensor) -> Tensor:
        return keys.to(self.projectors[layer]) @ self.projectors[layer]

    def _remember(self, layer: int, keys: Tensor) -> None:
        name = f"past_keys.{layer}"
        past = self.memory.get(name)
        total = keys.T @ keys
        self.memory = self.memory | {name: total if past is None else total + past.to(total)}
