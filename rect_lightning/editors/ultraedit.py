"""UltraEdit (Gu et al. 2025, "Training-, Subject-, and Memory-Free Lifelong Editing", arXiv 2505.14679)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.base import Editor
from rect_lightning.solving.gradients import AnswerGradients, answer_gradients
from rect_lightning.solving.running_statistics import RunningStatistics
from rect_lightning.solving.solvers import gradient_values, least_squares
from rect_lightning.solving.texts import answer_rows


class UltraEdit(Editor):
    """Edits by one backward pass: no search, no second moments, no subject.

    At the tokens from which the new target's tokens are predicted, the inputs ``h`` of the edited weight and the gradients
    ``g`` of the target's negative log-likelihood with respect to its outputs are normalised, each entry of ``[h‖g]`` by its
    mean and standard deviation over all tokens of all operations so far, this one included. With ``V = −lr ‖ĥ‖² ĝ`` the
    update is ``ΔWᵀ = (HᵀH + I)⁻¹ Hᵀ V``, for all layers from the same pass, which sees the weights as the operation found them.

    The statistics are remembered: checkpoints hold them, a failed operation leaves nothing in them, and in single mode each
    operation has its own. What an entry is like can only be told from several tokens, so edit many requests at once.

    Down projections are edited, as the authors do in GPT-J, Mistral and Phi; in LLaMA-3 and Qwen theirs are up and gate
    projections. Their code has one set of statistics for all weights of a shape; here each layer has its own.

    Args:
        lr: How far values move against the normalised gradient. ``‖ĥ‖²`` is about the inner width, so a narrower model asks for
            more than the published 1e-6.
        **kwargs: See `Editor`.

    Raises:
        ValueError: The learning rate is not positive.
    """

    def __init__(self, *, lr: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not lr > 0:
            raise ValueError(f"lr must be positive; got {lr}.")
        self.lr = lr

    def begin(self, requests: Sequence[EditRequest]) -> dict[int, tuple[Tensor, Tensor]]:
        """H and V of each layer.

        Raises:
            ValueError: There is only one token to tell from what entries are like.
        """

        def read(mine: Sequence[EditRequest]) -> list[AnswerGradients]:
            rows = answer_rows(self.model, mine)
            return answer_gradients(self.model, rows, self.layers, show_progress=self.show_progress)

        found = self.processes.collect(requests, read)
        self.log("edit/target_nll", torch.cat([answer.losses for answer in found]).mean(), batch_size=len(requests))
        each_layer = zip(
            self.layers,
            torch.cat([answer.keys for answer in found], dim=1),
            torch.cat([answer.gradients for answer in found], dim=1),
            strict=True,
        )
        return {layer: (keys, self._values(layer, keys, gradients)) for layer, keys, gradients in each_layer}

    def compute_update(
        self, layer: int, requests: Sequence[EditRequest], state: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The ridge regression of the values on the keys, ``[out, in]``."""
        keys, values = (x.to(self.model.weight(layer).device) for x in state[layer])
        return least_squares(values, keys, None, 1.0)

    def _values(self, layer: int, keys: Tensor, gradients: Tensor) -> Tensor:
        pairs = torch.cat([keys, gradients], dim=1)
        statistics = RunningStatistics.of(pairs)
        names = {name: f"{name}.{layer}" for name in vars(statistics)}
        if self.memory.keys() >= set(names.values()):
            statistics = RunningStatistics(**{name: self.memory[key] for name, key in names.items()}) + statistics
        if statistics.count < 2:
            raise ValueError(
                "UltraEdit normalises by what it has seen, which is a single token so far: set data.batch_size above 1."
            )
        self.memory = self.memory | {key: getattr(statistics, name) for name, key in names.items()}
        normalised = statistics.normalise(pairs)
        width = keys.shape[1]
        return gradient_values(normalised[:, :width], normalised[:, width:], self.lr)
