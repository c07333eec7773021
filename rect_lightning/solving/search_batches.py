"""How the rows of a target value search are cut into batches: for time first, with little padding, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rect_lightning.models.encoding import Row
from rect_lightning.solving.batching import by_length, by_time, padded


@dataclass(frozen=True, kw_only=True)
class SearchRows:
    """The texts of one request.

    Attributes:
        targets: One row a prefix: prefix, prompt and target, with subject and target marked. The bare prompt is first.
        essence: The row of "{subject} is a", for the KL term.
        id: Names the request in errors.
    """

    targets: tuple[Row, ...]
    essence: Row
    id: str = ""


_PREPARED = 8192
"""Padded tokens that are prepared in one pass; where prompts are short this is more than a search together has."""
_COLUMNS = 4
"""Columns that a row counts for at least: of more rows, which have fewer, preparing would take more memory than a step."""
_OVERHEADS = (40, 20, 10, 5)
"""What a batch is taken to cost besides its columns, in columns. Measured it is 40, in fp32 and in bf16 on a CPU; less makes
more batches, which take a little longer, with less padding."""
_PADDING = 0.2
"""Of the columns, padding is to be less than this where one of the overheads allows it."""


def budget_of(device: torch.device) -> int:
    """Padded columns after the subject in one batch, for a device to be busy."""
    return 384 if device.type == "cpu" else 1024


def in_chunks(requests: Sequence[SearchRows], together: int) -> list[list[int]]:
    """Requests with targets of like length together, so that batches are full and have little padding.

    Longest first: the others then do with the memory that is there, and what does not fit fails at once.
    """
    order = sorted(range(len(requests)), key=lambda i: -columns_of(requests[i].targets[0]))
    return [order[i : i + together] for i in range(0, len(order), together)]


def in_batches(rows: Sequence[Row], budget: int) -> Iterator[list[int]]:
    """Rows that are run together: alike in the columns of every step, and not too long to be prepared at once."""
    for together in by_length([row.subject + columns_of(row) for row in rows], _PREPARED):
        columns = [columns_of(rows[i]) for i in together]
        for overhead in _OVERHEADS:
            batches = by_time(columns, budget, overhead=overhead, most=max(1, budget // _COLUMNS))
            if sum(columns) > (1 - _PADDING) * padded(columns, batches):
                break
        yield from ([together[i] for i in indices] for indices in batches)


def columns_of(row: Row) -> int:
    """Columns to compute in every step: the subject's last token, and those up to the one before a target's last."""
    return len(row.ids) - 1 - row.subject if row.target_ids else 1


def padding_share(requests: Sequence[SearchRows], together: int, budget: int) -> float:
    """The share of the columns computed in a step of a search that are padding."""
    real = computed = 0
    for chosen in in_chunks(requests, together):
        rows = [row for i in chosen for row in (*requests[i].targets, requests[i].essence)]
        columns = [columns_of(row) for row in rows]
        real += sum(columns)
        computed += padded(columns, list(in_batches(rows, budget)))
    return 1 - real / computed
