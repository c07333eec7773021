"""Perplexity of a text: what an edit may not cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rect_lightning.metrics.forward import hidden_states, measuring, token_log_probs
from rect_lightning.processes import Processes
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length

if TYPE_CHECKING:
    from rect_lightning.models import Adapter


def perplexity(
    adapter: Adapter,
    text: str,
    *,
    context: int = 512,
    limit: int | None = None,
    tokens_per_batch: int = 2048,
    show_progress: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> float:
    """Exponential of the mean negative log-likelihood of a text's tokens, in chunks that do not overlap.

    The text is tokenised once and cut into chunks of ``context`` tokens, the last one shorter. Each chunk is read alone
    and its first token is not scored. Where the tokenizer puts a BOS token before a text, each chunk starts with one,
    which is among the ``context`` tokens: some models give nonsense without it. Then every token of the text is scored.

    Args:
        adapter: The model and its tokenizer.
        text: A text of any length.
        context: Tokens of a chunk.
        limit: Read this many tokens from the start of the text; None reads all.
        tokens_per_batch: Tokens of a batch; more needs more memory.
        show_progress: Whether to show a bar over the batches.
        processes: The processes that share the text, all with the same model; each gets the result.

    Raises:
        ValueError: ``context`` does not fit the model, ``limit`` is not positive, or there is no token to score.
    """
    losses, counts = chunk_losses(
        adapter,
        text,
        context=context,
        limit=limit,
        tokens_per_batch=tokens_per_batch,
        show_progress=show_progress,
        processes=processes,
    )
    return (losses.sum() / counts.sum()).exp().item()


def chunk_losses(
    adapter: Adapter,
    text: str,
    *,
    context: int = 512,
    limit: int | None = None,
    tokens_per_batch: int = 2048,
    show_progress: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> tuple[Tensor, Tensor]:
    """What `perplexity` is made of: the sum of each chunk's losses in nats, and how many tokens they are of.

    Returns:
        Two float64 tensors ``[chunks]`` on the CPU.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 token or None, got {limit}.")
    encoded = adapter.tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    special = encoded["special_tokens_mask"]
    body = [token for token, added in zip(encoded["input_ids"], special, strict=True) if not added][:limit]
    prefix = encoded["input_ids"][: special.index(0)] if body else []
    step = context - len(prefix)
    if not max(2, len(prefix) + 1) <= context <= adapter.context_length:
        raise ValueError(
            f"context must be from {max(2, len(prefix) + 1)} to {adapter.context_length}, this model's longest input; "
            f"got {context}."
        )
    chunks = [prefix + body[start : start + step] for start in range(0, len(body), step)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    if not chunks:
        raise ValueError(f"Nothing to score: the text gives {len(body)} tokens with limit={limit}.")

    losses = torch.zeros(len(chunks), dtype=torch.float64)
    batches = processes.mine(by_length([len(chunk) for chunk in chunks], tokens_per_batch))
    with processes.together(), measuring(adapter.model):
        for batch in track(batches, "Perplexity", show=show_progress, unit="batch"):
            rows = [chunks[i] for i in batch]
            states = [number * len(rows[0]) + place for number, row in enumerate(rows) for place in range(len(row) - 1)]
            tokens = [token for row in rows for token in row[1:]]
            hidden = hidden_states(adapter, rows).flatten(0, 1)
            log_probs, _ = token_log_probs(adapter, hidden, states, tokens)
            for i, row in zip(batch, log_probs.cpu().double().split([len(row) - 1 for row in rows]), strict=True):
                losses[i] = -row.sum()
    return processes.sum(losses), torch.tensor([len(chunk) - 1.0 for chunk in chunks], dtype=torch.float64)
