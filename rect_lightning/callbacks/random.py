"""The random control of RECT (Gu et al. 2024) as a Lightning callback."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.callbacks.changes import Change
from rect_lightning.callbacks.regulariser import Regulariser, check_share
from rect_lightning.solving.relative_change import largest


class Random(Regulariser):
    """Keep a random share of the entries of each update, and undo the others: the "Random" of the RECT paper.

    Exactly ``round(keep · N)`` entries, unscaled. They follow from the seed, the name of the parameter and how many steps
    were made, so a resumed run draws what an uninterrupted one does, and all processes draw the same. With ``scope: run`` they
    are the same entries all along: new ones at each step would undo, one after the other, all that was kept before.

    Args:
        keep: Share of the entries to keep, above 0 and up to 1.
        seed: Another one for other entries.
        **options: See `Regulariser`.

    Raises:
        ValueError: keep is no share.
    """

    own_options = ("keep", "seed")

    def __init__(self, keep: float = 0.4, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        check_share(self, keep=keep)
        self.keep, self.seed = keep, seed

    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Mask, and tell the share of entries that is kept."""
        logs: dict[str, float] = {}
        for change in changes:
            mask = self._mask(change.name, change.before)
            logs[f"{change.name}/kept"] = int(mask.count_nonzero()) / mask.numel()
            change.keep(mask)
        return logs

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        steps = 0 if self.scope == "run" else sum(self._steps)
        digest = hashlib.sha256(f"{self.seed} {steps} {name}".encode()).digest()
        # drawn on the CPU, which gives the same entries whatever the weight is on
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return largest(torch.rand(weight.shape, generator=generator), self.keep).to(weight.device)
