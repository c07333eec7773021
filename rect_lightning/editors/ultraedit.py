"""UltraEdit (Gu et al. 2025, "Training-, Subject-, and Memory-Free Lifelong Editing", arXiv 2505.14679)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.base import Editor
from rect_lightning.solving.running_statistics import RunningStatistics
from rect_lightning.solving.solvers import gradient_values, least_squares
from rect_lightning.solving.texts import answer_rows
from rect_lightning.solving.token_gradients import TokenGradients, token_gradients
from rect_lightning.solving.upper import run_lower


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

    def setup(self, stage: str) -> None:
        """Refuse edits of single requests that are alone in their statistics, besides what `Editor` refuses.

        Raises:
            ValueError: In single mode, a batch is one request.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_company(getattr(self.data_module, "batch_size", None))

    def begin(self, requests: Sequence[EditRequest]) -> dict[int, tuple[Tensor, Tensor]]:
        """H and V of each layer.

        Raises:
            ValueError: There is only one request, or one token, to tell from what entries are like.
        """
        self._check_company(len(requests))

        def read(mine: Sequence[EditRequest]) -> list[TokenGradients]:
            rows = answer_rows(self.model, mine)
            # no target's last token predicts one
            ids = [row.ids[:-1] for row in rows]
            lower = run_lower(self.model, ids, self.layers[0], show_progress=self.show_progress)
            return token_gradients(self.model, lower, rows, self.layers, predicting=True, device=torch.device("cpu"))

        found = self.processes.collect(requests, read)
        tokens = torch.tensor([len(row.u[self.layers[0]]) for row in found])
        losses = torch.stack([row.loss for row in found]) * tokens
        self.log("edit/target_nll", losses.sum() / tokens.sum(), batch_size=len(requests))
        state = {}
        for layer in self.layers:
            keys = torch.cat([row.u[layer] for row in found])
            # of sums over a target's tokens, not means
            gradients = torch.cat([row.delta[layer] * len(row.delta[layer]) for row in found])
            state[layer] = keys, self._values(layer, keys, gradients)
        return state

    def compute_update(
        self, layer: int, requests: Sequence[EditRequest], state: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The ridge regression of the values on the keys, ``[out, in]``."""
        keys, values = (x.to(self.model.weight(layer).device) for x in state[layer])
        return least_squares(values, keys, None, 1.0)

    def _check_company(self, requests: int | None) -> None:
        if self.mode == "single" and requests == 1:
            raise ValueError(
                "UltraEdit normalises by what it has seen, which in single mode is one operation, here of a single request: "
                "set data.batch_size above 1, and data.limit so that no request is left over; ROME and AlphaEdit edit single "
                "ones."
            )

    def _values(self, layer: int, keys: Tensor, gradients: Tensor) -> Tensor:
        pairs = torch.cat([keys, gradients], dim=1).double()
        statistics = RunningStatistics.of(pairs)
        names = {name: f"{name}.{layer}" for name in vars(statistics)}
        if self.memory.keys() >= set(names.values()):
            statistics = RunningStatistics(**{name: self.memory[key] for name, key in names.items()}) + statistics
        if statistics.count < 2:
            raise ValueError(
                "UltraEdit normalises by what it has seen, which is a single token so far: edit several requests together, by "
                "data.batch_size, or a single one by an editor that needs no company, such as ROME or AlphaEdit."
            )
        self.memory = self.memory | {key: getattr(statistics, name) for name, key in names.items()}
        normalised = statistics.normalise(pairs)
        width = keys.shape[1]
        return gradient_values(normalised[:, :width], normalised[:, width:], self.lr)
