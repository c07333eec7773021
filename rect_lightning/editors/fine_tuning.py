"""Fine-tuning as an editor: FT, FT-L and FT-M, and their low-rank form."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.base import Editor
from rect_lightning.progress import track
from rect_lightning.solving.likelihood import Loss, Places, negative_log_likelihood, places
from rect_lightning.solving.texts import answer_rows
from rect_lightning.solving.upper import Lower, run_lower, run_upper

Factors = tuple[Tensor, ...]
"""Matrices whose product is an update ``[out, in]``: itself, or B and A."""


class FineTuning(Editor):
    """Down projections trained on an operation's requests by Adam, whose whole way is the update.

    The literature's variants are settings of three options:

    =====  =========  ========  ======================================================================================
    name   loss       norm_box  source
    =====  =========  ========  ======================================================================================
    FT     last       null      Meng et al. 2022 (ROME), in the public code
    FT-L   last       5e-4      the same, with the L∞ constraint of Zhu et al. 2020 (arXiv 2012.00363)
    FT-M   target     null      Zhang et al. 2024 (arXiv 2401.01286), which corrects the loss
    LoRA   target     null      with a ``rank``: ``ΔW = B A`` (Hu et al. 2022, arXiv 2106.09685, unscaled: α = r)
    =====  =========  ========  ======================================================================================

    LoRA needs no peft here: of a few down projections it is these two factors, and what regularisers are to see is ΔW.

    All requests of an operation are one batch of Adam's; public code takes them in several. Only weights are trained, no
    biases, and in fp32 whatever the Trainer's precision. Several layers are trained together, once an operation. So with
    ``step_per: layer`` their updates are applied in turn, but a later layer does not make up for what a regulariser left out of
    an earlier one, and the result is that of ``step_per: operation``. ``edit/loss`` is the one before Adam's last step.

    Args:
        loss: target is the cross-entropy of the target's tokens, each where it is predicted. last reads all of them at the
            prompt's last token, which asks for the impossible of targets of several tokens. all adds the prompt's tokens.
        steps: Adam's steps at most.
        lr: Adam's learning rate. A low rank wants a larger one, such as 5e-3.
        norm_box: After each step no entry may be further than this from what it was before the operation; null for no limit.
        rank: Train two factors of this rank instead of the whole matrix; null for the matrix. The factors are multiplied at
            the end of each operation, so regularisers see ΔW itself, and operations may sum to a higher rank.
        stop: Training ends when the mean loss of the requests is below this.
        **kwargs: See `Editor`.

    Raises:
        ValueError: A number is out of range, or both a box and a rank are given.
    """

    def __init__(
        self,
        *,
        loss: Loss = "target",
        steps: int = 25,
        lr: float = 5e-4,
        norm_box: float | None = None,
        rank: int | None = None,
        stop: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("steps", steps), ("lr", lr), ("norm_box", norm_box), ("rank", rank)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive; got {value}.")
        if norm_box is not None and rank is not None:
            raise ValueError(
                "norm_box limits the entries of a matrix, and with a rank its factors are trained: give one."
            )
        self._steps_made = 0
        self.loss, self.steps, self.lr, self.norm_box, self.rank, self.stop = loss, steps, lr, norm_box, rank, stop

    @property
    def method(self) -> str:
        """The name in the table above; FineTuning for what has none there."""
        box, rank = self.norm_box is not None, self.rank is not None
        names = {("last", False, False): "FT", ("last", True, False): "FT-L"}
        names |= {("target", False, False): "FT-M", ("target", False, True): "LoRA"}
        return names.get((self.loss, box, rank), super().method)

    def begin(self, requests: Sequence[EditRequest]) -> dict[int, Tensor]:
        """Train all layers: their updates, ``[out, in]``.

        Raises:
            ValueError: The loss is not finite.
        """
        rows = answer_rows(self.model, requests)
        mine = self.processes.mine(rows)
        with self.processes.together():
            lower = list(run_lower(self.model, [row.ids for row in mine], self.layers[0]))
            read = [places([mine[i] for i in batch.rows], self.loss, self.device) for batch in lower]
        updates = {layer: self._factors(layer) for layer in self.layers}
        trained = [factor for factors in updates.values() for factor in factors]
        adam, self._steps_made = Adam(trained, lr=self.lr), 0
        for _ in track(range(self.steps), "fine-tuning", show=self.show_progress, unit="step"):
            with self.processes.together():
                loss, gradients = self._loss_and_gradients(lower, read, updates, 1 / len(rows))
            loss = self.processes.sum(loss)
            if not loss.isfinite():
                raise ValueError(f"The loss of fine-tuning is {float(loss)}: is lr={self.lr} too large?")
            if loss < self.stop:
                break
            for factor, gradient in zip(trained, gradients, strict=True):
                factor.grad = self.processes.sum(gradient)
            adam.step()
            self._steps_made += 1
            if self.norm_box is not None:
                for factor in trained:
                    factor.data.clamp_(-self.norm_box, self.norm_box)
        self.log("edit/loss", loss, batch_size=len(requests))
        return {layer: reduce(torch.matmul, factors).detach() for layer, factors in updates.items()}

    @property
    def abstained(self) -> bool:
        """Whether the model knew the targets already."""
        return self._steps_made == 0

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: dict[int, Tensor]) -> Tensor:
        """What training has made of this layer, ``[out, in]``."""
        return state[layer]

    def _factors(self, layer: int) -> Factors:
        """Where training begins: an update of zero."""
        weight = self.model.oriented(layer, self.model.weight(layer).detach())
        if self.rank is None:
            return (torch.zeros_like(weight).requires_grad_(),)
        out, width = weight.shape
        # the same numbers in every process and operation
        a = torch.randn(self.rank, width, generator=torch.Generator().manual_seed(layer)) / width**0.5
        return (weight.new_zeros(out, self.rank).requires_grad_(), a.to(weight).requires_grad_())

    def _loss_and_gradients(
        self, lower: Sequence[Lower], read: Sequence[Places], updates: dict[int, Factors], share: float
    ) -> tuple[Tensor, list[Tensor]]:
        """This process's part of the mean loss, and of its gradients by the factors of all layers."""
        changes = {layer: lambda key, factors=factors: _applied(factors, key) for layer, factors in updates.items()}
        trained = [factor for factors in updates.values() for factor in factors]
        total, gradients = torch.zeros((), device=self.device), [torch.zeros_like(factor) for factor in trained]
        for batch, places_ in zip(lower, read, strict=True):
            with torch.enable_grad():
                states = run_upper(self.model, batch, changes)
                loss = negative_log_likelihood(self.model, states, places_).sum() * share
            for gradient, more in zip(gradients, torch.autograd.grad(loss, trained), strict=True):
                gradient += more
            total += loss.detach()
        return total, gradients


def _applied(factors: Factors, key: Tensor) -> Tensor:
    for factor in reversed(factors):
        key = key @ factor.T
    return key
