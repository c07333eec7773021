"""The target value search: which output of an MLP makes the model say the new target.

For each request an offset ``d`` at the subject's last token minimises (Meng et al. 2022, ROME, eq. 4)

    mean over prefixes of NLL(target)  +  kl · KL(now ‖ before)  +  weight_decay · ‖d‖ / ‖h₀‖²

by Adam, projected on ``‖d‖ ≤ clamp · ‖h₀‖`` after each step, where the KL term is taken on the next token after the
subject in "{subject} is a". The search is nearly all of an editor's time. So all requests are searched for at once;
layers below the offset run once; of the columns before it only keys and values are kept; and logits are computed only
where the loss reads them. The numbers are those of one request at a time through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row
from rect_lightning.progress import track
from rect_lightning.solving.attention import plain_attention
from rect_lightning.solving.batching import pad
from rect_lightning.solving.blocks import Call, Tail, Trace, run_to, select_rows
from rect_lightning.solving.search_batches import SearchRows, budget_of, columns_of, in_batches, in_chunks


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """Hyper-parameters of the target value search."""

    steps: int = 20
    """Evaluations of the loss; the offset moves at most ``steps - 1`` times."""
    lr: float = 0.5
    """Learning rate of Adam."""
    weight_decay: float = 0.5
    """Weight of the offset's norm in the loss."""
    clamp: float = 0.75
    """Largest norm of the offset, relative to that of the state it is added to."""
    kl: float = 0.0625
    """Weight of the divergence on "{subject} is a"."""
    stop: float = 0.05
    """A request is done when its loss is below this."""
    together: int = 64
    """Requests searched for at once: fewer take less memory, more fill the batches."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clamp <= 0 or self.together < 1:
            raise ValueError(f"A value search needs steps >= 1, lr > 0, clamp > 0 and together >= 1; got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetValues:
    """What the search found, one row a request, in fp32.

    Attributes:
        value: Output of the down projection at the subject's last token of the bare prompt, ``[requests, width]``.
        stream: Output of the block there, ``[requests, width]``.
        offset: The offset ``d`` of ``value``, ``[requests, width]``.
        losses: Loss at each evaluation, ``[requests, steps]``, nan after a request was done.
    """

    value: Tensor
    stream: Tensor
    offset: Tensor
    losses: Tensor

    def take(self, request: int | Tensor) -> TargetValues:
        """One request, or requests by an index."""
        rows = torch.as_tensor(request, device=self.value.device).reshape(-1)
        return TargetValues(**{name: getattr(self, name)[rows] for name in _FIELDS})

    @staticmethod
    def cat(parts: Sequence[TargetValues]) -> TargetValues:
        """The requests of several searches, one after the other."""
        return TargetValues(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS})


_FIELDS = ("value", "stream", "offset", "losses")
_LOGITS = 64
"""States whose logits are computed at a time."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows that are searched in one batch: of any requests, but alike in the number of columns after the subject.

    Attributes:
        owner: ``[rows]``, the request in the chunk.
        weight: ``[rows]``, the row's share in its request's loss.
        hidden: ``[rows, columns, width]``, output of the layer's block from the subject's last token on.
        value: ``[rows, width]``, output of its down projection at that token.
        calls: How to run the tail on these columns.
        where: ``[targets, 2]``, row and column of every logit that a target is read from.
        token: ``[targets]``, the token wanted there.
        share: ``[targets]``, one over the number of the row's target tokens.
        essence: ``[essences]``, the rows that are held to what they said before, at their first column.
        reference: ``[essences, vocabulary]``, their log-probabilities without offset; ``[0, 1]`` if there are none.
    """

    owner: Tensor
    weight: Tensor
    hidden: Tensor
    value: Tensor
    calls: list[Call]
    where: Tensor
    token: Tensor
    share: Tensor
    essence: Tensor
    reference: Tensor

    def of(self, active: Tensor) -> _Bucket | None:
        """The rows of the requests that are still active; nothing if none is."""
        keep = active[self.owner]
        if not keep.any():
            return None
        if keep.all():
            return self
        rows = keep.nonzero()[:, 0]
        new_row = keep.cumsum(0) - 1
        targets, essences = keep[self.where[:, 0]], keep[self.essence]
        where = self.where[targets]
        return _Bucket(
            owner=self.owner[rows],
            weight=self.weight[rows],
            hidden=self.hidden[rows],
            value=self.value[rows],
            calls=select_rows(self.calls, rows, len(keep)),
            where=torch.stack([new_row[where[:, 0]], where[:, 1]], dim=1),
            token=self.token[targets],
            share=self.share[targets],
            essence=new_row[self.essence[essences]],
            reference=self.reference[essences],
        )


def search_values(
    adapter: Adapter,
    tail: Tail,
    requests: Sequence[SearchRows],
    search: ValueSearch,
    *,
    relative_to: str = "stream",
    budget: int | None = None,
    show_progress: bool = False,
) -> TargetValues:
    """Search for the target values of many requests.

    Args:
        adapter: The model.
        tail: Its part after the edited layer, in the precision to search in.
        requests: The texts of each request.
        search: Hyper-parameters.
        relative_to: Whether ``h₀``, which clamp and weight decay are relative to, is the block's output (``"stream"``, as
            MEMIT has it) or the down projection's (``"value"``, as ROME has it).
        budget: Padded tokens after the subject in one batch; bounds the memory of the backward pass. None for 384 on a CPU,
            where more is not faster, else 1,024.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: A loss is not finite.
    """
    budget = budget_of(adapter.device) if budget is None else budget
    chunks = in_chunks(requests, search.together)
    bar = track(range(len(chunks) * search.steps), "target values", show=show_progress, unit="step")
    with plain_attention(adapter), torch.autocast(adapter.device.type, enabled=False), bar:
        found = [
            _search_chunk(adapter, tail, [requests[i] for i in chosen], search, relative_to, budget, bar.update)
            for chosen in chunks
        ]
    return TargetValues.cat(found).take(torch.tensor([i for chosen in chunks for i in chosen]).argsort())


def _search_chunk(
    adapter: Adapter,
    tail: Tail,
    requests: Sequence[SearchRows],
    search: ValueSearch,
    relative_to: str,
    budget: int,
    advance: Callable[[int], object],
) -> TargetValues:
    buckets: list[_Bucket | None]
    buckets, value, stream = _prepare(adapter, tail, requests, search, budget)
    origin = value if relative_to == "value" else stream
    scale = origin.norm(dim=-1)
    offset = torch.zeros_like(value)
    first_moment, second_moment = torch.zeros_like(offset), torch.zeros_like(offset)
    losses = offset.new_full((len(requests), search.steps), torch.nan)
    active = torch.ones(len(requests), dtype=torch.bool, device=offset.device)
    for step in range(search.steps):
        last = step == search.steps - 1
        loss, gradient = _loss_and_gradient(adapter, tail, buckets, offset, differentiate=not last)
        norm = offset.norm(dim=-1)
        decay = search.weight_decay / scale**2
        loss = loss + decay * norm
        # the unit vector first: decay over a vanishing norm overflows, and the offset starts at zero
        gradient = gradient + decay[:, None] * (offset / norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None])
        if not loss[active].isfinite().all():
            names = ", ".join(r.id for r, bad in zip(requests, ~loss.isfinite() & active, strict=True) if bad)
            raise ValueError(f"The search's loss is not finite for the requests {names}: is search.lr too large?")
        losses[active, step] = loss[active]
        active = active & (loss >= search.stop)
        if last or not active.any():
            break
        for i, bucket in enumerate(buckets):  # in place, so that a bucket's caches go as soon as it has shrunk
            buckets[i] = bucket and bucket.of(active)
        moved = _adam(offset, gradient, first_moment, second_moment, step + 1, search.lr)
        limit = search.clamp * scale
        moved = moved * (limit / moved.norm(dim=-1).clamp(min=limit))[:, None]
        offset = torch.where(active[:, None], moved, offset)
        advance(1)
    advance(search.steps - step)
    return TargetValues(value=value, stream=stream, offset=offset, losses=losses)


@torch.no_grad()
def _prepare(
    adapter: Adapter, tail: Tail, requests: Sequence[SearchRows], search: ValueSearch, budget: int
) -> tuple[list[_Bucket | None], Tensor, Tensor]:
    """Run everything that the offset cannot change: the buckets, and value and stream of the bare prompts."""
    rows = [(i, row) for i, request in enumerate(requests) for row in request.targets]
    if search.kl:
        rows += [(i, request.essence) for i, request in enumerate(requests)]
    value = stream = torch.empty(0)
    buckets: list[_Bucket | None] = []
    for indices in in_batches([row for _, row in rows], budget):
        members = [rows[i] for i in indices]
        anchors = [row.subject for _, row in members]
        column = max(anchors)
        ids = [row.ids[: row.subject + columns_of(row)] for _, row in members]
        trace = run_to(adapter, pad(ids, adapter.device, anchors=anchors), tail.layer)
        bucket = _bucket(tail, trace, column, members, requests, search)
        buckets.append(bucket)
        if not value.numel():
            value = bucket.value.new_zeros(len(requests), bucket.value.shape[-1])
            stream = torch.zeros_like(value)
        for j, (i, row) in enumerate(members):
            if row is requests[i].targets[0]:
                value[i], stream[i] = bucket.value[j], bucket.hidden[j, 0]
    return buckets, value, stream


def _bucket(
    tail: Tail,
    trace: Trace,
    column: int,
    members: Sequence[tuple[int, Row]],
    requests: Sequence[SearchRows],
    search: ValueSearch,
) -> _Bucket:
    device = trace.hidden.device
    calls, states = tail.suffix_calls(trace, column)
    hidden = trace.hidden[:, column:].float().clone()
    where: list[tuple[int, int]] = []
    token: list[int] = []
    share: list[float] = []
    weight: list[float] = []
    essence: list[int] = []
    for j, (i, row) in enumerate(members):
        if row is requests[i].essence:
            essence.append(j)
            weight.append(search.kl)
            continue
        weight.append(1 / len(requests[i].targets))
        places = range(row.target - 1 - row.subject, len(row.ids) - 1 - row.subject)
        where += [(j, place) for place in places]
        token += row.target_ids
        share += [1 / len(places)] * len(places)
    held = torch.tensor(essence, device=device, dtype=torch.long)
    reference = tail.logits(states[held, column]).log_softmax(-1) if essence else hidden.new_empty(0, 1)
    return _Bucket(
        owner=torch.tensor([i for i, _ in members], device=device),
        weight=torch.tensor(weight, device=device),
        hidden=hidden,
        value=trace.value[:, column].float().clone(),
        calls=calls,
        where=torch.tensor(where, device=device, dtype=torch.long).view(-1, 2),
        token=torch.tensor(token, device=device, dtype=torch.long),
        share=torch.tensor(share, device=device),
        essence=held,
        reference=reference,
    )


def _loss_and_gradient(
    adapter: Adapter,
    tail: Tail,
    buckets: Sequence[_Bucket | None],
    offset: Tensor,
    *,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """NLL and KL of each request, ``[requests]``, and their gradient, ``[requests, width]``, zero if not asked for."""
    leaf = offset.detach().requires_grad_()
    loss, gradient = offset.new_zeros(len(offset)), torch.zeros_like(offset)
    for bucket in buckets:
        if bucket is None:
            continue
        with torch.set_grad_enabled(differentiate):
            change = adapter.stream_change(tail.layer, bucket.value, leaf[bucket.owner])
            hidden = torch.cat([bucket.hidden[:, :1] + change[:, None], bucket.hidden[:, 1:]], dim=1)
            states = tail.run(hidden, bucket.calls)
            read = torch.cat([states[bucket.where[:, 0], bucket.where[:, 1]], states[bucket.essence, 0]])
        row = torch.cat([bucket.where[:, 0], bucket.essence])
        terms, slopes = _read_out(tail, read, bucket, bucket.weight[row], differentiate=differentiate)
        if differentiate:  # not backward(), which would leave gradients on weights that are trained elsewhere
            gradient += torch.autograd.grad(read, leaf, slopes)[0]
        loss.index_add_(0, bucket.owner[row], terms)
    return loss, gradient


def _read_out(
    tail: Tail, states: Tensor, bucket: _Bucket, weight: Tensor, *, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """The term in the loss of each state that a bucket reads, ``[states]``, and its gradient, ``[states, width]``.

    Differentiated part by part: logits are the largest tensors of all.
    """
    terms, slopes = [], []
    targets = len(bucket.where)
    for start in range(0, len(states), _LOGITS):
        part = states[start : start + _LOGITS].detach().requires_grad_(differentiate)
        of_targets, of_essences = slice(start, start + _LOGITS), slice(max(0, start - targets), None)
        with torch.set_grad_enabled(differentiate):
            logits = tail.logits(part)
            wanted = bucket.token[of_targets]
            nll = F.cross_entropy(logits[: len(wanted)], wanted, reduction="none") * bucket.share[of_targets]
            now = logits[len(wanted) :].log_softmax(-1)
            kl = (now.exp() * (now - bucket.reference[of_essences][: len(now)])).sum(-1)
            term = torch.cat([nll, kl]) * weight[start : start + _LOGITS]
        if differentiate:
            slopes.append(torch.autograd.grad(term.sum(), part)[0])
        terms.append(term.detach())
    return torch.cat(terms), torch.cat(slopes) if differentiate else torch.zeros_like(states)


def _adam(offset: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, lr: float) -> Tensor:
    """One step of Adam with its usual constants, each row a problem of its own; ``m`` and ``v`` are updated in place."""
    m.lerp_(gradient, 1 - 0.9)
    v.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
    root = (v / (1 - 0.999**step)).sqrt_().add_(1e-8)
    return offset - lr / (1 - 0.9**step) * m / root
