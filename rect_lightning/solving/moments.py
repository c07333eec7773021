"""Second moments of the keys, ``C = E[k kᵀ]``: what a closed-form edit leaves alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rect_lightning.models.adapter import Adapter
from rect_lightning.processes import Processes
from rect_lightning.progress import track
from rect_lightning.solving import corpus, moment_files
from rect_lightning.solving.blocks import ending_at
from rect_lightning.solving.corpus import Moments

_log = logging.getLogger(__name__)

_BATCH_TOKENS = 4096  # in one forward pass
_BLOCK = 256  # rows of a product that are multiplied at a time


class SecondMoment:
    """The running mean of ``k kᵀ``, not centred (Meng et al. 2022, arXiv 2202.05262, eq. 2).

    One batch is multiplied in fp32 on the keys' device, the products are added up in fp64 on the CPU: that keeps the
    rounding of many batches out, needs no fp64 units, and takes no accelerator memory between batches (1.6 GB of RAM
    a layer at a width of 14,336).

    Args:
        width: Width of the keys.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, width, dtype=torch.float64)

    def update(self, keys: Tensor) -> None:
        """Add keys ``[tokens, width]``.

        Raises:
            ValueError: A key is not finite, or too large to be squared in fp32.
        """
        keys = keys.float()
        for start in range(0, keys.shape[1], _BLOCK):
            # kkᵀ is symmetric: of each block of rows only what is right of the diagonal
            rows = keys[:, start : start + _BLOCK].T @ keys[:, start:]
            if not rows.diagonal().isfinite().all():
                raise ValueError("keys are not finite, or too large to be squared in fp32")
            self.total[start : start + _BLOCK, start:] += rows.cpu()
        self.count += len(keys)

    def collect(self, processes: Processes) -> None:
        """Bring what all processes have seen to the first one; the others start anew."""
        total, count = processes.sum(self.total), int(processes.sum(torch.tensor(self.count)))
        self.total, self.count = (total, count) if processes.is_first else (total.zero_(), 0)

    def compute(self) -> Tensor:
        """``C``, ``[width, width]`` fp32.

        Raises:
            ValueError: No key was seen.
        """
        if not self.count:
            raise ValueError("No keys were seen, so they have no second moment.")
        upper = (self.total / self.count).float().triu_()
        return upper + upper.triu(1).T


def second_moments(
    adapter: Adapter,
    layers: list[int],
    moments: Moments,
    *,
    fingerprint: str,
    cache: Path | None = None,
    save_every: float = 60.0,
    show_progress: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> dict[int, Tensor]:
    """``C`` of each layer, from files, from the cache, or in one pass over the text.

    All tokens of the text count, see `corpus.token_rows`. The pass ends at the last layer that is needed, and runs in
    the model's own dtype whatever autocast is on. Layers that the cache has are not computed again. A pass that was
    killed goes on where its last saved state stands, with the same result to the bit; of two processes that need
    the same moments one computes them and the other waits.

    The processes of a distributed run share the text. The first one alone reads and writes the cache; what it has, the
    others get from it. A pass that was killed goes on under any number of processes.

    Args:
        adapter: The model, with the weights that the moments are wanted for.
        layers: Layers, increasing.
        moments: Source and size of the text.
        fingerprint: What tells these weights from others, see `weights_fingerprint`.
        cache: Folder for finished moments and the state of a pass; None keeps nothing.
        save_every: Seconds between saved states of a pass.
        show_progress: Whether to show a bar over tokens.
        processes: The processes of a distributed run, all with the same model.

    Returns:
        ``C`` by layer, ``[d, d]`` fp32 on the CPU, where ``d`` is the width of the keys.

    Raises:
        FileNotFoundError: A file that the source names is not there.
        ValueError: The layers, the source or its files do not fit the model, keys are not finite, or there are fewer
            tokens than the keys are wide, so that ``C`` has no inverse.
    """
    with processes.together():
        adapter.check_layers(layers)
        if moments.is_precomputed:
            return moment_files.precomputed(adapter, layers, moments.source, fingerprint=fingerprint)
        _check_tokens(adapter, layers, moments.tokens, moments)
        header = corpus.identity(adapter, moments) | {"dtype": str(adapter.weight(layers[-1]).dtype)}
    header |= {"fingerprint": fingerprint, "batch_tokens": _BATCH_TOKENS}
    if cache is None:
        found = _pass(adapter, layers, moments, header, None, save_every, show_progress, processes)
    else:
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache / "moments" / fingerprint / digest
        found = _through_cache(adapter, layers, moments, header, folder, save_every, show_progress, processes)
    if processes.is_first:
        return {layer: processes.broadcast(found[layer]) for layer in layers}
    return {layer: processes.broadcast(torch.empty(2 * [_width(adapter, layer)])) for layer in layers}


def _through_cache(
    adapter: Adapter,
    layers: list[int],
    moments: Moments,
    header: dict[str, Any],
    folder: Path,
    save_every: float,
    show_progress: bool,
    processes: Processes,
) -> dict[int, Tensor]:
    """What the folder has, and what it lacked, now in it too; nothing in processes other than the first."""
    with processes.together():
        found = _cached(adapter, layers, folder, header) if processes.is_first else {}
    if processes.agree(found.keys() >= set(layers)):
        return found  # without the lock, so that a cache that cannot be written to can still be read

    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first:
                stack.enter_context(_locked(folder))
                found = _cached(adapter, layers, folder, header)
        missing = processes.agree([layer for layer in layers if layer not in found])
        if missing:
            state = folder / f"state-{'-'.join(map(str, missing))}.safetensors"
            computed = _pass(adapter, missing, moments, header, state, save_every, show_progress, processes)
            with processes.together():
                for layer, moment in computed.items():
                    path = folder / moment_files.file_name(adapter, layer)
                    moment_files.write(path, {"C": moment}, header | {"layer": layer})
                if processes.is_first:
                    _remove(folder, "state-*")
            found |= computed
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        _remove(folder, "*.partial")  # we hold the lock: whoever was writing these is dead
        yield


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def _check_tokens(adapter: Adapter, layers: list[int], tokens: int, moments: Moments) -> None:
    width = max(_width(adapter, layer) for layer in layers)
    if tokens < width:
        raise ValueError(
            f"{tokens:,} tokens of {moments.source} are too few: the keys are {width:,} wide, and the second moment of "
            f"fewer tokens has no inverse. Take moments.tokens of at least {width:,}, better {10 * width:,}."
        )


def _width(adapter: Adapter, layer: int) -> int:
    return adapter.oriented(layer, adapter.weight(layer)).shape[1]


def _cached(adapter: Adapter, layers: list[int], folder: Path, header: dict[str, Any]) -> dict[int, Tensor]:
    """The layers that the folder has whole; a file that is broken or says anything else counts as absent."""
    found = {}
    for layer in layers:
        with contextlib.suppress(OSError, ValueError):
            tensors, written = moment_files.read(folder / moment_files.file_name(adapter, layer))
            if written == header | {"layer": layer}:
                found[layer] = tensors["C"]
    return found


def _pass(
    adapter: Adapter,
    layers: list[int],
    moments: Moments,
    header: dict[str, Any],
    state: Path | None,
    save_every: float,
    show_progress: bool,
    processes: Processes,
) -> dict[int, Tensor]:
    """Compute the layers' moments, from the saved state on where there is one; nothing but in the first process."""
    sums = {layer: SecondMoment(_width(adapter, layer)) for layer in layers}
    with processes.together():
        rows_done = _restore(sums, state, header) if processes.is_first else 0
    rows_done, tokens = processes.agree((rows_done, sums[layers[0]].count))
    if processes.is_first and state is not None:
        text = "text that the model samples" if moments.source == "self" else moments.source
        _log.info("Second moments of layers %s from %s tokens of %s; kept for next time.", layers, moments.tokens, text)
    saved = time.monotonic()
    with track((), "second moments", show=show_progress, unit="token", total=moments.tokens) as bar:
        bar.update(tokens)
        rows_left = corpus.token_rows(
            adapter, moments, skip=rows_done, processes=processes, show_progress=show_progress
        )
        batches = stacked(rows_left)
        # sampling asks the other processes itself, each process reads files on its own
        reading = Processes() if moments.source == "self" else processes
        while True:
            with reading.together():
                together = list(islice(batches, processes.count))
            if not together:
                break
            with processes.together():
                for rows in processes.mine(together):
                    _update(adapter, sums, rows.to(adapter.device))
            rows_done += sum(map(len, together))
            tokens += (read := sum(rows.numel() for rows in together))
            bar.update(read)
            if state is not None and processes.agree(time.monotonic() - saved >= save_every):
                _collect(sums, processes)
                with processes.together():
                    if processes.is_first:
                        totals = {str(layer): moment.total for layer, moment in sums.items()}
                        moment_files.write(state, totals, header | {"rows": rows_done, "count": tokens})
                saved = time.monotonic()
    if not tokens:
        raise ValueError(f"moments.source: {moments.source} has no text.")
    _check_tokens(adapter, layers, tokens, moments)
    _collect(sums, processes)
    with processes.together():
        return {layer: moment.compute() for layer, moment in sums.items()} if processes.is_first else {}


def _collect(sums: dict[int, SecondMoment], processes: Processes) -> None:
    for moment in sums.values():
        moment.collect(processes)


def _restore(sums: dict[int, SecondMoment], state: Path | None, header: dict[str, Any]) -> int:
    """Fill the sums from a saved state; how many rows of the text are in them."""
    if state is None:
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        totals, written = moment_files.read(state)
        rows, count = written.pop("rows"), written.pop("count")
        if written == header and totals.keys() == {str(layer) for layer in sums}:
            for layer, moment in sums.items():
                moment.total, moment.count = totals[str(layer)], count
            return int(rows)
    return 0


def stacked(rows: Iterator[Tensor]) -> Iterator[Tensor]:
    """Rows of the same length stacked, ``[rows, context]``, so that there is nothing to pad."""
    waiting: list[Tensor] = []
    for row in rows:
        if waiting and (len(row) != len(waiting[0]) or (len(waiting) + 1) * len(row) > _BATCH_TOKENS):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield torch.stack(waiting)


@torch.no_grad()
def _update(adapter: Adapter, sums: dict[int, SecondMoment], rows: Tensor) -> None:
    """One forward pass up to the last layer, its keys added to the sums."""

    def adds_to(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            try:
                sums[layer].update(args[0].flatten(0, -2))
            except ValueError as error:
                raise ValueError(f"Layer {layer}: {error}. Do the weights hold NaN, or is fp16 too narrow?") from error

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(rows.device.type, enabled=False))
        for layer in sums:
            stack.callback(adapter.projection(layer).register_forward_pre_hook(adds_to(layer)).remove)
        stack.enter_context(ending_at(adapter.projection(max(sums))))
        adapter.backbone(input_ids=rows, use_cache=False)
