"""RECT (Gu et al. 2024) as a Lightning callback."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

from rect_lightning.solving.relative_change import change_statistics, largest, relative_change


class RECT(Callback):
    """Keep the entries of each update with the largest relative change ``|ΔW / W|``, and zero the others.

    For every weight that the optimizer is about to step, in ``on_before_optimizer_step``; per matrix, against the weight as
    it stands. Definition and source: `rect_lightning.solving.relative_change`.

    The optimizer has to be plain SGD, whose change of a weight is ``-lr`` times its gradient, so that a masked gradient is
    a masked change. Under any other a masked entry moves all the same, by momentum or weight decay.

    Args:
        keep: Share of a matrix's entries to keep, above 0 and up to 1. The paper recommends 0.4.
        thresholds: Values of δ of which to log the share of entries above, before masking. The paper's table shows these.
    """

    def __init__(self, keep: float = 0.4, thresholds: tuple[float, ...] = (0.077, 0.171)) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"RECT's keep is a share above 0 and up to 1, such as 0.4 for the top 40 %; got {keep}.")
        self.keep = keep
        self.thresholds = list(thresholds)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients, and log what is left of each.

        Raises:
            ValueError: The optimizer is not plain SGD, or an update is not finite.
        """
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is None or not weight.grad.any():
                    continue
                _check_plain_sgd(optimizer, group)
                name = names[id(weight)]
                kept = self._mask(weight, group["lr"], name)
                pl_module.log_dict({f"rect/{name}/{key}": value for key, value in kept.items()})

    def _mask(self, weight: Tensor, lr: float, name: str) -> dict[str, float]:
        gradient = weight.grad
        assert gradient is not None
        if not gradient.isfinite().all():
            raise ValueError(
                f"The update of {name} has entries that are not finite; no weight was changed by this step."
            )
        # the change is -lr times the gradient; one copy of the matrix and a mask are all that is held besides
        delta = relative_change(gradient, weight).mul_(lr)
        statistics = change_statistics(gradient, delta, self.thresholds)
        mask = largest(delta, self.keep)
        kept = int(mask.count_nonzero()) / mask.numel()
        gradient.masked_fill_(mask.logical_not_(), 0)  # a product with a mask would first make a float copy of it
        return {**statistics, "manhattan": lr * statistics["manhattan"], "kept": kept}


def _check_plain_sgd(optimizer: Optimizer, group: dict) -> None:
    plain = isinstance(optimizer, SGD) and not (group["momentum"] or group["weight_decay"] or group["maximize"])
    if not plain:
        raise ValueError(
            "RECT masks gradients, which is masking the change of the weights only under torch.optim.SGD without momentum "
            f"or weight decay; this optimizer is {type(optimizer).__name__}. Use plain SGD, or remove the callback."
        )
