"""The text over which second moments are taken, as rows of token ids."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rect_lightning.models.adapter import Adapter
from rect_lightning.processes import Processes
from rect_lightning.progress import track

_SAMPLED_TOGETHER = 128  # rows; part of what a sample is, since rounding depends on it


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Where the second moments of the keys come from, and how much text they are taken over."""

    source: str = "self"
    """``self``: text that the model samples, which needs no download. Else a text file (``.txt``, documents separated
    by blank lines, or ``.jsonl``), the name of a data set on the hub, which is streamed, or moments that are already
    there: a file (``.npz`` as the authors of ROME and MEMIT publish them, ``.safetensors`` as this package keeps them),
    a path with ``{layer}`` in it, or a folder of such files."""
    tokens: int = 100_000
    """Length of the text in tokens; at least the width of the keys, or the moments have no inverse."""
    context: int = 128
    """Tokens in one row that the model reads at a time."""
    separator: str | None = None
    """Token between documents and before a sampled text; default: the tokenizer's EOS token. For a chat model name the
    end-of-text token of its pretraining, such as ``<|endoftext|>``."""
    seed: int = 0
    """Seed of the sampled text; no other source is random."""
    text_field: str = "text"
    """Field of a ``.jsonl`` file or a hub data set that holds the text."""
    config: str | None = None
    """Configuration of the hub data set, such as ``20231101.en`` of ``wikimedia/wikipedia``."""
    split: str = "train"
    """Split of the hub data set."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("moments.source is empty: say self, a file, or a hub data set (moments: null for none).")
        for name, least in (("tokens", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"moments.{name} must be at least {least}, got {getattr(self, name)}.")

    @property
    def is_precomputed(self) -> bool:
        """Whether the source holds moments and not text."""
        path = Path(self.source)
        return self.source != "self" and (path.suffix in (".npz", ".safetensors") or path.is_dir())

    @property
    def is_file(self) -> bool:
        """Whether the source is a text file."""
        return Path(self.source).suffix in (".txt", ".jsonl")


def identity(adapter: Adapter, moments: Moments) -> dict[str, Any]:
    """All that decides which token rows come out, beside the weights; what a cache must tell apart.

    A file counts by its content, a hub data set by its name.

    Raises:
        FileNotFoundError: The text file is not there.
        ValueError: The context or the separator does not fit the model, or the source is of no known kind.
    """
    if moments.context > adapter.context_length:
        raise ValueError(
            f"moments.context is {moments.context}, but the model reads {adapter.context_length} tokens at most."
        )
    common: dict[str, Any] = {
        "tokens": moments.tokens,
        "context": moments.context,
        "separator": _separator(adapter, moments),
    }
    if moments.source == "self":
        return {
            "source": "self",
            "seed": moments.seed,
            "start": _start(adapter),
            "sampled_together": _SAMPLED_TOGETHER,
        } | common
    tokenizer: Any = adapter.tokenizer
    common["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    if moments.is_file:
        path = Path(moments.source)
        if not path.is_file():
            raise FileNotFoundError(f"moments.source: there is no file {path.resolve()}.")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        field = moments.text_field if path.suffix == ".jsonl" else ""
        return {"source": path.suffix, "sha256": digest, "text_field": field} | common
    if Path(moments.source).exists():
        raise ValueError(f"moments.source: {moments.source} is none of .txt, .jsonl, .npz, .safetensors or a folder.")
    hub = {"source": moments.source, "config": moments.config, "split": moments.split, "text_field": moments.text_field}
    return hub | common


def token_rows(
    adapter: Adapter,
    moments: Moments,
    *,
    skip: int = 0,
    processes: Processes = Processes(),  # noqa: B008 - frozen
    show_progress: bool = False,
) -> Iterator[Tensor]:
    """The text as rows of token ids, ``[context]`` int64 on the CPU, ``tokens`` in all; the last row may be shorter.

    Documents are packed: laid end to end with the separator between, then cut into rows, so there is no padding. Where
    the tokenizer puts a BOS token in front of a text, every row starts with one. Separators and BOS tokens are part of
    the text and of ``tokens``: the model meets them in front of every prompt, so an edit must leave their values alone.

    Args:
        adapter: The model, which samples where the source is ``self``.
        moments: The source.
        skip: Rows to leave out at the front; the rest are the same as without. Their text is read all the same.
        processes: The processes that share the sampling; all get all rows.
        show_progress: Whether to show a bar while the model samples.
    """
    if moments.source == "self":
        yield from _sampled_rows(adapter, moments, skip=skip, processes=processes, show_progress=show_progress)
        return
    start = _start(adapter)
    stream: list[int] = []
    left = moments.tokens
    for document in _documents(moments):
        ids = adapter.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [*ids, _separator(adapter, moments)]
        size = min(moments.context, left) - len(start)
        position = 0
        while left and len(stream) - position >= size:
            row = [*start, *stream[position : position + size]]
            position += size
            left -= len(row)
            if skip:
                skip -= 1
            else:
                yield torch.tensor(row)
            size = min(moments.context, left) - len(start)
        del stream[:position]
        if not left:
            return
    if stream:
        row = [*start, *stream]
        left -= len(row)
        if not skip:
            yield torch.tensor(row)
    warnings.warn(
        f"{moments.source} has {moments.tokens - left:,} tokens, fewer than the {moments.tokens:,} of moments.tokens; "
        "the second moments are taken over these.",
        stacklevel=2,
    )


def _separator(adapter: Adapter, moments: Moments) -> int:
    tokenizer = adapter.tokenizer
    if moments.separator is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token: name the token between documents as moments.separator.")
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if moments.separator not in vocabulary:
        raise ValueError(f"moments.separator {moments.separator!r} is no token of this tokenizer.")
    return int(vocabulary[moments.separator])


def _start(adapter: Adapter) -> list[int]:
    """What the tokenizer puts in front of every text: a BOS token or nothing."""
    bos = adapter.tokenizer.bos_token_id
    return [bos] if bos is not None and adapter.tokenizer("a")["input_ids"][0] == bos else []


def _documents(moments: Moments) -> Iterator[str]:
    """The source's documents that are not blank."""
    path = Path(moments.source)
    if path.suffix == ".txt":
        yield from _paragraphs(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _field(_parse(line, f"{path}, line {number}"), moments, f"{path}, line {number}")
    else:
        for number, record in enumerate(_hub_records(moments), 1):
            yield from _field(record, moments, f"{moments.source}, record {number}")


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                lines.append(line.rstrip("\n"))
            elif lines:
                yield "\n".join(lines)
                lines = []
    if lines:
        yield "\n".join(lines)


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from error


def _field(record: Any, moments: Moments, place: str) -> Iterator[str]:
    text = record.get(moments.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: no text in field {moments.text_field!r} (found: {found}). Set moments.text_field.")
    if text.strip():
        yield text


def _hub_records(moments: Moments) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        records = iter(load_dataset(moments.source, moments.config, split=moments.split, streaming=True))
        first = next(records, None)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise ValueError(
            f"moments.source: {moments.source!r} is no file here, and could not be streamed as a hub data set (config "
            f"{moments.config}, split {moments.split}): {type(error).__name__}: {error} Give a .txt or .jsonl file, or "
            "source: self, which needs no download."
        ) from error
    if first is not None:
        yield first
    yield from records


def _sampled_rows(
    adapter: Adapter, moments: Moments, *, skip: int, processes: Processes, show_progress: bool
) -> Iterator[Tensor]:
    """Rows that the model samples at temperature 1 after its BOS or separator token, which the row includes.

    An end of text within a row is not special: the model begins another text.
    """
    count = -(-moments.tokens // moments.context)
    generator = torch.Generator().manual_seed(moments.seed)
    draws = torch.rand(count, moments.context, generator=generator)
    first = [*_start(adapter), _separator(adapter, moments)][0]
    weights = _sampling_weights(adapter)
    # always the same groups, wherever one starts: rounding, and so a token here and there, depends on who is in a batch
    done = skip - skip % _SAMPLED_TOGETHER
    groups = [draws[begin : begin + _SAMPLED_TOGETHER] for begin in range(done, count, _SAMPLED_TOGETHER)]
    for begin in range(0, len(groups), processes.count):
        together = groups[begin : begin + processes.count]
        mine = processes.mine(together)
        with processes.together():
            sampled = [_sample(adapter, weights, first, group, show_progress=show_progress) for group in mine]
        for source, group in enumerate(together):
            rows = sampled[0] if source == processes.rank else torch.empty(group.shape, dtype=torch.long)
            for index, row in enumerate(processes.broadcast(rows, source=source), done):
                if index >= skip:
                    yield row[: moments.tokens - index * moments.context]
            done += len(group)


def _sampling_weights(adapter: Adapter) -> dict[str, Tensor]:
    """The weights to sample with: bf16 where that makes a CPU faster. The keys are read from the model itself."""
    parameters: dict[str, Tensor] = dict(adapter.model.named_parameters())
    if adapter.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return {name: p.bfloat16() if p.dtype == torch.float32 else p for name, p in parameters.items()}
    return parameters


@torch.no_grad()
def _sample(
    adapter: Adapter, weights: dict[str, Tensor], first: int, draws: Tensor, *, show_progress: bool = False
) -> Tensor:
    """Rows ``[rows, context]`` by inverse transform sampling from as many uniform draws, the first one unused.

    ``generate`` would take its randomness from the global generator, and draw a number for each word of the vocabulary.
    """
    from transformers import StaticCache

    columns = [torch.full_like(draws[:, :1], first, dtype=torch.long)]
    # a cache that grows is copied at every token
    cache = StaticCache(config=adapter.model.config.get_text_config(), max_cache_len=draws.shape[1])
    steps = draws[:, 1:].split(1, dim=1)
    for draw in track(steps, "sampling text for moments", show=show_progress, unit="column"):
        inputs = {
            "input_ids": columns[-1].to(adapter.device),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with torch.autocast(adapter.device.type, enabled=False):
            logits = torch.func.functional_call(adapter.model, weights, (), inputs).logits
        # on the CPU, since CUDA's cumsum differs from run to run
        cumulative = logits[:, -1].float().softmax(-1).cpu().cumsum(-1)
        token = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        columns.append(token.clamp(max=cumulative.shape[-1] - 1))  # a product rounded up to the total would be no token
    return torch.cat(columns, dim=1)
