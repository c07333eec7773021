"""The losses by which targets are learned: negative log-likelihoods of tokens, each read at a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row

Loss = Literal["target", "last", "all"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens are read in a batch of rows.

    Attributes:
        row: ``[n]`` int64, the row.
        column: ``[n]`` int64, the column whose logits are read.
        token: ``[n]`` int64, the token wanted there.
        share: ``[n]``, one over the number of the row's tokens.
    """

    row: Tensor
    column: Tensor
    token: Tensor
    share: Tensor


def places(rows: Sequence[Row], loss: Loss, device: torch.device) -> Places:
    """The places of a loss in rows that all start in the first column.

    Args:
        rows: Prompts with their targets.
        loss: target reads each of the target's tokens where it is predicted; last reads all of them at the prompt's last
            token; all reads the prompt's tokens as well as the target's.
        device: Where the model is.
    """
    starts = [1 if loss == "all" else row.target for row in rows]
    found = [
        (i, row.target - 1 if loss == "last" else j - 1, row.ids[j])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        for j in range(start, len(row.ids))
    ]
    share = [1 / (len(rows[i].ids) - starts[i]) for i, *_ in found]
    row, column, token = torch.tensor(found, device=device, dtype=torch.long).view(-1, 3).unbind(1)
    return Places(row, column, token, torch.tensor(share, device=device))


def negative_log_likelihood(adapter: Adapter, states: Tensor, places: Places) -> Tensor:
    """The mean of each row over its places, in nats and fp32, ``[rows]``.

    Args:
        adapter: The model, for its vocabulary head.
        states: Normalised hidden states, ``[rows, columns, width]``.
        places: What to read.
    """
    logits = adapter.logits(states[places.row, places.column]).float()
    log_probs = logits.gather(1, places.token[:, None])[:, 0] - logits.logsumexp(-1)
    return logits.new_zeros(len(states)).index_add(0, places.row, -places.share * log_probs)


def divergence(adapter: Adapter, before: Tensor, after: Tensor, lengths: Sequence[int]) -> Tensor:
    """``KL(before ‖ after)`` of the next token, the mean over each row's tokens, in nats and fp32, ``[rows]``.

    Args:
        adapter: The model, for its vocabulary head.
        before: Normalised hidden states, ``[rows, columns, width]``.
        after: Those of the changed model.
        lengths: The tokens of each row, which start in the first column.
    """
    length = torch.tensor(lengths, device=after.device)
    row, column = (torch.arange(after.shape[1], device=after.device) < length[:, None]).nonzero().unbind(1)
    with torch.no_grad():
        reference = adapter.logits(before[row, column]).float().log_softmax(-1)
    now = adapter.logits(after[row, column]).float().log_softmax(-1)
    kl = (reference.exp() * (reference - now)).sum(-1)
    return kl.new_zeros(len(after)).index_add(0, row, kl / length[row])
