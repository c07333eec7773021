"""The processes of a distributed run: they share out work and agree on what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
U = TypeVar("U")
Rows = TypeVar("Rows")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """One process among others, by default alone.

    Alone, every method hands back what it was given. Else each is a collective operation of torch's default process group:
    all processes must call it, in the same order.

    Attributes:
        rank: This process, counted from 0.
        count: How many there are.
        device: Where the group's backend wants tensors.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share, every ``count``-th item; nobody is asked."""
        return items[self.rank :: self.count]

    def map(self, items: Sequence[T], compute: Callable[[Sequence[T]], Rows]) -> Rows:
        """Share out items, and give every process the result for all of them.

        Args:
            items: The same ones in every process, at least one, any number.
            compute: Gives a dataclass of tensors for some items, each tensor with as many rows an item as another item has,
                in the order of the items.
        """
        if self.count == 1:
            return compute(items)
        # a process that is left without a share repeats another's, to learn the shapes
        with self.together():
            found: Any = compute(self.mine(items) or items[:1])
        names = [part.name for part in fields(found)]
        return type(found)(**{name: self._gather(getattr(found, name), len(items)) for name in names})

    def gather(self, share: Sequence[T]) -> list[T]:
        """What the processes made of their shares (see `mine`), any objects that can be pickled, in the items' order."""
        shares: Any = self._tell(list(share))
        return [part[i] for i in range(len(shares[0])) for part in shares if i < len(part)]

    def collect(self, items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[U]]) -> list[U]:
        """Share out items, and give every process what comes of all of them, in order.

        Args:
            items: The same ones in every process, any number.
            compute: Gives one thing an item, of any kind that can be pickled, in the order of the items.
        """
        with self.together():
            found = compute(self.mine(items))
        return self.gather(found)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside in one process fails in all, so that none waits for it in vain; no process may ask others inside.

        Raises:
            RuntimeError: It failed in another process.
        """
        failure = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
        told = self._tell(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"Process {rank} failed: {message}")

    def _gather(self, rows: Tensor, items: int) -> Tensor:
        mine = rows.unflatten(0, (max(1, len(self.mine(range(items)))), -1))
        missing = -(-items // self.count) - len(mine)
        sent = torch.cat([mine, mine[:missing]]).to(self.device)  # all must send as much
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(parts, sent)
        return torch.stack(parts, dim=1).flatten(0, 1)[:items].flatten(0, 1).to(rows.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in every process."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> Tensor:
        """One process's tensor; the others give one of its shape and dtype."""
        if self.count == 1:
            return tensor
        sent = tensor.to(self.device, copy=True)
        dist.broadcast(sent, source)
        return sent.to(tensor.device)

    def agree(self, value: T) -> T:
        """The first process's value, of any kind that can be pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def all_have(self, value: object) -> bool:
        """Whether all processes have an equal value, of any kind that can be pickled."""
        return all(other == value for other in self._tell(value))

    def _tell(self, value: object) -> list[object]:
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values
