"""Running part of a decoder: up to a layer, or from a layer on, on part of the columns.

A decoder tells its blocks more than their input: masks, positions, rotary tables, differently in each family and, with
sliding windows, in each layer. Rather than compute these again for every family, `run_to` notes with what arguments the
model calls the later blocks, and `Tail` calls them again with those arguments, cut to the columns that are wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter
from rect_lightning.solving.attention import plain_attention
from rect_lightning.solving.batching import Batch
from rect_lightning.solving.packed import can_pack, pack, same_input


class _Stop(Exception):
    """Ends a forward pass early."""


@contextmanager
def ending_at(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass of the model ends, without error, once this module has run."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments with which the model calls a block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trace:
    """A forward pass that ended after a layer.

    Attributes:
        hidden: Output of that layer's block, ``[rows, columns, width]``.
        value: Output of its down projection, ``[rows, columns, width]``.
        calls: For every later block the arguments it would have been called with.
    """

    hidden: Tensor
    value: Tensor
    calls: list[Call]


def run_to(adapter: Adapter, batch: Batch, layer: int) -> Trace:
    """Run the model on a batch up to and including ``layer``'s block."""
    from transformers import DynamicCache

    hidden: list[Tensor] = []
    value: list[Tensor] = []
    calls: list[Call] = []

    def keep_hidden(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden.append(first(output))
        returns_tuple.append(isinstance(output, tuple))

    def keep_value(_module: nn.Module, _args: Any, output: Tensor) -> None:
        value.append(output)

    def note_call(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(Call(args, kwargs))
        return (states,) if returns_tuple[0] else states

    returns_tuple: list[bool] = []
    handles = [
        adapter.blocks[layer].register_forward_hook(keep_hidden),
        adapter.projection(layer).register_forward_hook(keep_value),
    ]
    later = list(adapter.blocks)[layer + 1 :]
    wrappers = [block.__dict__.get("forward") for block in later]  # some libraries shadow the method in the same way
    for block in later:
        block.forward = note_call  # shadows the class's method on this one object, until it is deleted below
    try:
        with ending_at(adapter.norm):
            # an empty cache goes through all the blocks' arguments, where a Tail puts its own in its place
            adapter.backbone(**batch.inputs(), past_key_values=DynamicCache(), use_cache=False)
    finally:
        for block, wrapper in zip(later, wrappers, strict=True):
            del block.forward
            if wrapper is not None:
                block.forward = wrapper
        for handle in handles:
            handle.remove()
    return Trace(hidden[0], value[0], calls)


class _Recorder:
    """A key-value cache that keeps the columns before ``column`` and hands everything back unchanged."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # cloned: a view would keep the columns alive that are not wanted
        self.layers[layer_idx] = keys[..., : self.column, :].clone(), values[..., : self.column, :].clone()
        return keys, values


class _Prefix:
    """A key-value cache of the columns before those that are computed; it never grows."""

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before_keys, before_values = self.layers[layer_idx]
        return torch.cat([before_keys, keys], dim=-2), torch.cat([before_values, values], dim=-2)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> _Prefix:
        """The same with each tensor changed."""
        return _Prefix({layer: (change(keys), change(values)) for layer, (keys, values) in self.layers.items()})


class Tail:
    """The blocks after a layer, the final norm and the head, in a precision of their own.

    In another precision, or where weights can be packed, these are a frozen copy, made once, else the model's own modules.

    Args:
        adapter: The model.
        layer: The tail starts after this layer's block.
        dtype: Precision of weights and activations; None for the model's own modules, which follow its edits.
    """

    def __init__(self, adapter: Adapter, layer: int, dtype: torch.dtype | None) -> None:
        parts = [*list(adapter.blocks)[layer + 1 :], adapter.norm, adapter.head]
        packed = dtype is not None and can_pack(parts, dtype)
        own = next(adapter.norm.parameters()).dtype
        dtype = own if dtype is None else dtype
        if packed or dtype != own:
            together = same_input(parts, lambda: _one_token(adapter)) if packed else [[] for _ in parts]
            with plain_attention(adapter):  # a copy's configuration is a copy as well and stays like this
                # one by one: two copies of the whole tail in full precision would be more than the search saves
                parts = [
                    _frozen(part, dtype, packed=packed, together=groups)
                    for part, groups in zip(parts, together, strict=True)
                ]
        self.adapter, self.layer, self.dtype = adapter, layer, dtype
        self.blocks: list[nn.Module] = parts[:-2]
        self.norm, self.head = parts[-2:]

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits in fp32 of the last block's output."""
        return self.adapter.logits(self.norm(hidden), self.head).float()

    def run(self, hidden: Tensor, calls: Sequence[Call]) -> Tensor:
        """The last block's output for the output of the tail's layer, ``[rows, columns, width]``."""
        hidden = hidden.to(self.dtype)
        for block, call in zip(self.blocks, calls, strict=True):
            hidden = first(block(hidden, *call.args, **call.kwargs))
        return hidden

    def suffix_calls(self, trace: Trace, column: int) -> tuple[list[Call], Tensor]:
        """Run all columns once, and give the calls that compute the columns from ``column`` on without the others.

        The keys and values of the earlier columns, which what happens later cannot change, are held in the calls.

        Returns:
            The calls, and the last block's output of all columns, ``[rows, columns, width]``.
        """
        recorder = _Recorder(column)
        states = self.run(trace.hidden, self._cut(trace.calls, 0, trace.hidden.shape[1], recorder))
        return self._cut(trace.calls, column, trace.hidden.shape[1], _Prefix(recorder.layers)), states

    def _cut(self, calls: Sequence[Call], column: int, columns: int, cache: Any) -> list[Call]:
        from transformers import Cache

        done: dict[int, Any] = {}  # blocks share their masks and tables: cut each of them once

        def cut(x: Any) -> Any:
            if isinstance(x, Cache):
                return cache
            if not isinstance(x, Tensor):
                return x
            if id(x) not in done:
                done[id(x)] = self._cast(_from_column(x, column, columns))
            return done[id(x)]

        return [_mapped(call, cut) for call in calls]

    def _cast(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dtype == self.dtype:
            return x
        # a mask's fp32 minimum would become -inf, and a padded column's softmax nan
        return x.clamp(min=torch.finfo(self.dtype).min).to(self.dtype)


def _one_token(adapter: Adapter) -> None:
    one = torch.ones(1, 1, dtype=torch.long, device=adapter.device)
    adapter.backbone(input_ids=one, attention_mask=one, use_cache=False)


def _frozen(part: nn.Module, dtype: torch.dtype, *, packed: bool, together: Sequence[Sequence[str]]) -> nn.Module:
    """A copy of a part in a precision, whose tensors are the part's own where that is theirs already."""
    tensors = [*part.parameters(), *part.buffers()]
    own: dict[int, Any] = {id(x): x for x in tensors if x.dtype == dtype or not x.is_floating_point()}
    copied = copy.deepcopy(part, own).to(dtype)
    return pack(copied, together) if packed else copied


def select_rows(calls: Sequence[Call], rows: Tensor, count: int) -> list[Call]:
    """Calls of a tail for some of the ``count`` rows of a batch."""
    done: dict[int, Any] = {}

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, rows) if x.shape[0] == count else x

    def pick(x: Any) -> Any:
        if not isinstance(x, Tensor | _Prefix):
            return x
        if id(x) not in done:
            done[id(x)] = take(x) if isinstance(x, Tensor) else x.mapped(take)
        return done[id(x)]

    return [_mapped(call, pick) for call in calls]


def without_cache(calls: Sequence[Call]) -> list[Call]:
    """The same calls, which compute all columns anew each time and keep nothing."""
    from transformers import Cache

    return [_mapped(call, lambda x: None if isinstance(x, Cache) else x) for call in calls]


def _mapped(call: Call, change: Callable[[Any], Any]) -> Call:
    """A call with each of its arguments changed, also inside tuples."""
    return Call(_inside(call.args, change), {name: _inside(x, change) for name, x in call.kwargs.items()})


def _inside(x: Any, change: Callable[[Any], Any]) -> Any:
    # a function of its own: one that called itself from within would be a reference cycle, which keeps the caches of
    # thousands of requests in memory until the garbage collector comes
    return tuple(_inside(item, change) for item in x) if isinstance(x, tuple) else change(x)


def first(output: Any) -> Tensor:
    """The hidden states of a block's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _from_column(x: Tensor, column: int, columns: int) -> Tensor:
    """The part of a mask ``[rows, heads, columns, columns]``, table or list of positions that later columns need."""
    dim = 2 if x.ndim == 4 else 1
    if column and x.ndim > 1 and x.shape[dim] == columns:
        return x.narrow(dim, column, columns - column)
    return x
