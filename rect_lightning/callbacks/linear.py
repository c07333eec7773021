"""What regularisers share that tell a weight's input side from its output side."""

from abc import abstractmethod
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from rect_lightning.callbacks.changes import Change, replace
from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.solving.orientation import keeps_in_out


class LinearRegulariser(Regulariser):
    """Leaves a part of the update of each linear layer's weight, seen as ``[out, in]``; all else is left as it is.

    Args:
        **options: See `Regulariser`.
    """

    repeatable = False

    @abstractmethod
    def project(self, name: str, update: Tensor, before: Tensor) -> Tensor | None:
        """What to leave of an update, given the weight that it starts from, all ``[out, in]``; None for all of it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights.

        Raises:
            ValueError: No chosen parameter is the weight of a linear layer.
        """
        super().on_fit_start(trainer, pl_module)
        self._linear: dict[str, nn.Module] = {}
        for name in self._names.values():
            path, _, kind = name.rpartition(".")
            module = pl_module.get_submodule(path)
            if kind == "weight" and (isinstance(module, nn.Linear) or keeps_in_out(module)):
                self._linear[name] = module
        if not self._linear:
            raise ValueError(
                f"{type(self).__name__} acts on the weights of Linear and Conv1D layers, and none of the chosen parameters is "
                f"one; they are such as {', '.join([*self._names.values()][:3])}."
            )

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Project, and tell what share of the norm is left."""
        logs: dict[str, float] = {}
        for change in changes:
            if change.name in self._linear:
                turned = keeps_in_out(self._linear[change.name])
                update = change.update
                left = self.project(change.name, *(x.T if turned else x for x in (update, change.before)))
                if left is not None:
                    logs |= replace(change, update, (left.T if turned else left).to(update.dtype))
        return logs
