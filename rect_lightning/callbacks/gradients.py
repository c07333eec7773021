"""What gradients tell of the step that an optimizer is about to make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def is_plain_sgd(optimizer: Optimizer, scaler: Any) -> bool:
    """Whether the change is ``±lr`` times the gradient that the hook sees: not where a fused step has yet to unscale it."""
    plain = type(optimizer) is SGD and not any(g["momentum"] or g["weight_decay"] for g in optimizer.param_groups)
    return plain and (scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False))


def check_gradients(weights: Mapping[str, Tensor], *, skips: bool) -> bool:
    """Whether all gradients are finite, which they need not be where a loss scaler skips such a step.

    Raises:
        ValueError: One is sparse, or not finite without a scaler.
    """
    for name, weight in weights.items():
        if weight.grad is None:
            continue
        if weight.grad.layout != torch.strided:
            raise ValueError(
                f"The gradient of {name} is sparse, which regularisers cannot honour: use sparse=False in the embedding, or "
                "leave the parameter out. No weight was changed by this step."
            )
        if not weight.grad.isfinite().all():
            if skips:
                return False
            raise ValueError(
                f"The update of {name} has entries that are not finite; no weight was changed by this step."
            )
    return True
