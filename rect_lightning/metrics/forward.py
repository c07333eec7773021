"""What all measurements share: the model at rest, and log-probabilities in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rect_lightning.solving.batching import pad

if TYPE_CHECKING:
    from rect_lightning.models import Adapter

LOGITS_PER_SLICE = 2**25
"""Logits held at a time: 128 MiB in fp32, 256 positions of a vocabulary of 128k."""


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients within; afterwards every module is back in the mode it was in.

    ``no_grad`` and not ``inference_mode``, so that nothing made within is barred from autograd later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_lengths(adapter: Adapter, lengths: Sequence[int], prompts: Sequence[str]) -> None:
    """Refuse rows that the model cannot run.

    Args:
        adapter: The model.
        lengths: How many tokens the model will read for each prompt, those after the prompt included.
        prompts: The prompts, named in the messages.

    Raises:
        ValueError: A row has no token, or more than the model has positions for.
    """
    for length, prompt in zip(lengths, prompts, strict=True):
        if length < 1:
            raise ValueError(f"No token stands before what {prompt!r} is to be continued with; give it some text.")
        if length > adapter.context_length:
            raise ValueError(
                f"The prompt beginning {prompt[:40]!r} needs {length} tokens with its continuation, the model's "
                f"context is {adapter.context_length}: shorten the prompt or its continuation."
            )


def hidden_states(adapter: Adapter, rows: Sequence[Sequence[int]]) -> Tensor:
    """Normalised hidden states of token rows of any lengths.

    Args:
        adapter: The model; its vocabulary head is not run.
        rows: Token ids, one sequence a row.

    Returns:
        Tensor ``[rows, longest, width]`` in the model's dtype; what stands beyond a row's length is meaningless.
    """
    batch = pad(rows, adapter.device)
    hidden: Tensor = adapter.backbone(**batch.inputs(), use_cache=False).last_hidden_state
    return hidden


def token_log_probs(
    adapter: Adapter, hidden: Tensor, states: Sequence[int], tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, and what the model would have said instead.

    The vocabulary is projected slice by slice, so memory does not grow with the number of tokens; the log-softmax is
    in fp32 whatever the model's dtype.

    Args:
        adapter: The model, for its vocabulary head.
        hidden: Normalised hidden states ``[n, width]``.
        states: For each token the index of the hidden state that predicts it; equal ones in a row are projected once.
        tokens: The token ids.

    Returns:
        Log-probabilities in nats, fp32 ``[len(tokens)]``, and the ids of the likeliest tokens, int64 ``[len(tokens)]``.
    """
    index = torch.tensor(states, device=hidden.device)
    wanted = torch.tensor(tokens, device=hidden.device)
    per_slice = max(1, LOGITS_PER_SLICE // adapter.model.config.get_text_config().vocab_size)
    log_probs, predicted = [], []
    for index_slice, wanted_slice in zip(index.split(per_slice), wanted.split(per_slice), strict=True):
        distinct, which = index_slice.unique_consecutive(return_inverse=True)
        logits = adapter.logits(hidden[distinct]).float()
        which, wanted_slice = which.to(logits.device), wanted_slice.to(logits.device)  # a split model ends elsewhere
        log_probs.append(logits[which, wanted_slice] - logits.logsumexp(-1)[which])
        predicted.append(logits.argmax(-1)[which])
    return torch.cat(log_probs), torch.cat(predicted)
