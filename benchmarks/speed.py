"""Where the time of an edit goes, and how far each phase is from what the machine could do.

    python -m benchmarks.speed --out docs/speed.md                         # SmolLM2 and the shipped facts
    python -m benchmarks.speed --requests counterfact.jsonl --naive 10     # also public code's way, on 10 requests

A bound is the arithmetic a phase cannot avoid at the machine's own speed of matrix products, or the bytes it has to move at the
speed of memory. All numbers are of one run on one machine; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
import yaml

from benchmarks.machine import description, matrix_speed, memory_speed, peak_memory, timed
from benchmarks.naive import naive_scores, naive_search
from rect_lightning.data import EditRequest, read_requests
from rect_lightning.metrics import evaluate, score_targets
from rect_lightning.models import Adapter, Source, adapter_for
from rect_lightning.shipped import configs_folder
from rect_lightning.solving.blocks import Tail, ending_at
from rect_lightning.solving.corpus import Moments, token_rows
from rect_lightning.solving.keys import subject_states
from rect_lightning.solving.moments import SecondMoment, second_moments, stacked
from rect_lightning.solving.prefixes import Prefixes
from rect_lightning.solving.relative_change import largest, relative_change
from rect_lightning.solving.search_batches import SearchRows, budget_of, padding_share
from rect_lightning.solving.solvers import Factored, least_squares
from rect_lightning.solving.texts import key_rows, search_rows
from rect_lightning.solving.values import TargetValues, ValueSearch, search_values

TEMPLATES = ("{}", "The. {}", "Therefore, it is so. {}")
RECT_ENTRIES = 45_000_000  # a down projection of LLaMA 7B
MEASURED = 100  # requests at most, where all are a thousand
BEGIN, END = "<!-- tables of benchmarks.speed -->", "<!-- end of the tables -->"
FACTS = Path(__file__).parent.parent / "rect_lightning" / "data" / "facts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured speeds."""

    fp32: float
    bf16: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds of a phase, and the least that its work could take."""

    name: str
    seconds: float
    bound: float

    def row(self) -> str:
        """A row of the table."""
        return f"| {self.name} | {self.seconds:.2f} | {self.bound:.2f} | {self.bound / self.seconds:.0%} |"


class Work:
    """The floating point operations of a model's parts."""

    def __init__(self, adapter: Adapter, layer: int) -> None:
        blocks = [sum(p.numel() for p in block.parameters()) for block in adapter.blocks]
        self.below, self.above = sum(blocks[: layer + 1]), sum(blocks[layer + 1 :])
        self.head = adapter.head.weight.numel()

    def search(self, requests: list[SearchRows], found: TargetValues) -> float:
        """Forward and backward to the offset: twice two operations a parameter, column and evaluation of the loss."""
        evaluations = (~found.losses.isnan()).sum(dim=1).tolist()
        total = 0.0
        for request, steps in zip(requests, evaluations, strict=True):
            columns = 1 + sum(len(row.ids) - 1 - row.subject for row in request.targets)
            logits = 1 + sum(len(row.target_ids) for row in request.targets)
            total += 4 * steps * (columns * self.above + logits * self.head)
        return total


def once(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


def clocks(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call by the clock on the wall and by that of the processor."""
    start = perf_counter(), process_time()
    function()
    return perf_counter() - start[0], process_time() - start[1]


def phases(adapter: Adapter, layers: list[int], requests: list[EditRequest], machine: Machine) -> list[Phase]:
    """Time each phase of a MEMIT operation."""
    last, inner = layers[-1], adapter.oriented(layers[-1], adapter.weight(layers[-1])).shape[1]
    return [
        sampling(adapter, machine),
        searching(adapter, last, requests, machine, torch.float32),
        searching(adapter, last, requests, machine, torch.bfloat16),
        *keys_and_solve(adapter, last, requests, machine),
        adding_up(inner, machine),
        *rect(RECT_ENTRIES, machine),
        measuring(adapter, requests[:20], machine),
    ]


def sampling(adapter: Adapter, machine: Machine) -> Phase:
    """Five prefixes of 10 tokens, for each of which the weights have to be read."""
    weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    seconds, _ = once(lambda: Prefixes(count=5, lengths=(10,)).resolve(adapter))
    return Phase(name="prefixes", seconds=seconds, bound=5 * 10 * weights / machine.memory)


def searching(
    adapter: Adapter,
    layer: int,
    requests: list[EditRequest],
    machine: Machine,
    dtype: torch.dtype,
    search: ValueSearch = ValueSearch(),  # noqa: B008 - frozen
) -> Phase:
    """The target value search."""
    tail, rows = Tail(adapter, layer, dtype), search_rows(adapter, requests, TEMPLATES)
    seconds, found = once(lambda: search_values(adapter, tail, rows, search))
    name, speed = ("fp32", machine.fp32) if dtype == torch.float32 else ("bf16", machine.bf16)
    return Phase(name=f"search, {name}", seconds=seconds, bound=Work(adapter, layer).search(rows, found) / speed)


def keys_and_solve(adapter: Adapter, layer: int, requests: list[EditRequest], machine: Machine) -> list[Phase]:
    """The keys of a layer, the factor of its C, and the update that both give."""
    rows = key_rows(adapter, requests, TEMPLATES)
    seconds, states = once(lambda: subject_states(adapter, rows, layer))
    tokens = sum(row.subject + 1 for row in rows)
    found = [
        Phase(
            name="keys of a layer",
            seconds=seconds,
            bound=2 * tokens * Work(adapter, layer).below / machine.fp32,
        )
    ]
    keys = states.key[:: len(TEMPLATES)]
    out, inner = adapter.oriented(layer, adapter.weight(layer)).shape
    sample = torch.randn(2 * inner, inner)
    matrix = sample.T @ sample / len(sample) + 0.01 * torch.eye(inner)
    seconds, factor = once(lambda: Factored(matrix, "C"))
    found.append(Phase(name="factor of C, fp64", seconds=seconds, bound=2 * inner**3 / 3 / machine.fp32))
    residuals = torch.randn(len(keys), out)
    seconds = timed(lambda: least_squares(residuals, keys, factor, 1000.0), 3)
    least = 2 * len(keys) * inner * (2 * inner + out) * 2  # an fp64 operation is worth two of fp32
    found.append(Phase(name="solve, fp64", seconds=seconds, bound=least / machine.fp32))
    return found


def adding_up(width: int, machine: Machine) -> Phase:
    """The second moment of some keys."""
    keys, moment = torch.randn(4096, width), SecondMoment(width)
    seconds = timed(lambda: moment.update(keys))
    return Phase(name="moments of 4,096 keys", seconds=seconds, bound=2 * 4096 * width**2 / machine.fp32)


def rect(entries: int, machine: Machine, turns: int = 7) -> list[Phase]:
    """RECT of one matrix, the selection in it, and what torch's own takes: medians, measured in turns."""
    weight, update = torch.randn(entries), torch.randn(entries)
    delta = relative_change(update, weight)
    ways: dict[str, tuple[Callable[[], Any], int]] = {  # with the bytes that each has to move
        f"RECT, {entries / 1e6:.0f} M entries": (lambda: update * largest(relative_change(update, weight), 0.4), 12),
        "its selection alone": (lambda: largest(delta, 0.4), 4),
        "torch.kthvalue on the same": (lambda: delta.kthvalue(round(0.6 * entries)), 4),
    }
    seconds = {name: [] for name in ways}
    for _ in range(turns):
        for name, (run, _) in ways.items():
            seconds[name].append(once(run)[0])
    return [
        Phase(name=name, seconds=median(seconds[name]), bound=moved * entries / machine.memory)
        for name, (_, moved) in ways.items()
    ]


def measuring(adapter: Adapter, requests: list[EditRequest], machine: Machine) -> Phase:
    """All metrics of some requests."""
    parameters = sum(p.numel() for p in adapter.model.parameters())
    seconds, _ = once(lambda: evaluate(adapter, requests))
    prompts = {p for r in requests for p in (r.text, *r.paraphrases, *(n.prompt for n in r.neighbours))}
    tokens = sum(len(ids) for ids in adapter.tokenizer(list(prompts))["input_ids"])
    name = f"metrics of {len(requests)} requests"
    return Phase(name=name, seconds=seconds, bound=2 * tokens * parameters / machine.fp32)


@torch.no_grad()
def forward(adapter: Adapter, batches: list[torch.Tensor], layer: int) -> None:
    """The forward pass up to a layer's down projection, and nothing else."""
    for rows in batches:
        with ending_at(adapter.projection(layer)):
            adapter.backbone(input_ids=rows, use_cache=False)


def moments_against_bare(adapter: Adapter, layers: list[int], tokens: int, turns: int = 7) -> list[str]:
    """Tokens a second of the second moments and of the bare forward pass over the same text, in turns."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        prose = FACTS.with_name("prose.txt").read_text()
        source.write_text("\n\n".join([prose] * (1 + 8 * tokens // len(prose))))  # a token has less than 8 characters
        text = Moments(source=str(source), tokens=tokens, context=256)
        batches = list(stacked(token_rows(adapter, text)))
        pairs = [
            (
                clocks(lambda: forward(adapter, batches, layers[-1])),
                clocks(lambda: second_moments(adapter, layers, text, fingerprint="")),
            )
            for _ in range(turns)
        ]
    bare, whole = ([of[which][0] for of in pairs] for which in (0, 1))
    shares = [sorted(b[clock] / w[clock] for b, w in pairs) for clock in (0, 1)]
    shown = [f"{median(share):.0%} ({share[0]:.0%} to {share[-1]:.0%})" for share in shares]
    return [
        "",
        f"| second moments of {len(layers)} layers | tokens a second | the bare forward pass "
        f"| share, median of {turns} turns | of processor time |",
        "|---|---|---|---|---|",
        f"| {tokens:,} tokens | {tokens / median(whole):.0f} | {tokens / median(bare):.0f} | {shown[0]} | {shown[1]} |",
    ]


def against_naive(
    adapter: Adapter, layer: int, requests: list[EditRequest], few: int = 10, turns: int = 3
) -> list[str]:
    """The search of the same requests in public code's way and in ours, seconds and ratios; one at a time only a few.

    In turns, so that a machine that is slow for a while is slow for all: alone, after each request; together, after each
    third of them, of which the median counts.
    """
    rows, search = search_rows(adapter, requests, TEMPLATES), ValueSearch()
    tails = {"fp32": Tail(adapter, layer, torch.float32), "bf16": Tail(adapter, layer, torch.bfloat16)}

    def ours(tail: Tail, of: list[SearchRows]) -> tuple[float, torch.Tensor]:
        seconds, found = once(lambda: search_values(adapter, tail, of, search))
        return seconds, found.offset

    naive = []
    alone: dict[str, list[tuple[float, torch.Tensor]]] = {name: [] for name in tails}
    together: dict[str, list[tuple[float, torch.Tensor]]] = {name: [] for name in tails}
    ends = {round(len(rows) * turn / turns) for turn in range(1, turns + 1)}
    for number, row in enumerate(rows):
        naive.append(once(lambda row=row: naive_search(adapter, layer, [row], search)))
        for name, tail in tails.items():
            if number < few:
                alone[name].append(ours(tail, [row]))
            if number + 1 in ends:
                together[name].append(ours(tail, rows))
    lines = [
        "",
        f"| search of {len(rows)} requests | requests | seconds | speed-up | offset, cosine to the first |",
        "|---|---|---|---|---|",
        f"| one at a time, whole model, fp32 | {len(rows)} | {sum(seconds for seconds, _ in naive):.2f} | 1 | 1 |",
    ]
    found = {f"together, {name}": (median(part for part, _ in parts), parts[0][1]) for name, parts in together.items()}
    for name, parts in alone.items():
        found[f"one at a time, {name}"] = (sum(part for part, _ in parts), torch.cat([offset for _, offset in parts]))
    for title, (seconds, offsets) in found.items():
        count = len(offsets)
        ratio = sum(part for part, _ in naive[:count]) / seconds
        expected = torch.cat([offset for _, offset in naive[:count]])
        cosine = torch.cosine_similarity(offsets, expected).mean()
        lines.append(f"| {title} | {count} | {seconds:.2f} | {ratio:.1f} | {cosine:.6f} |")
    return lines


def metrics_against_naive(adapter: Adapter, requests: list[EditRequest]) -> list[str]:
    """The scores of the same prompts, one forward pass each and in batches."""
    asked = [
        (prompt, target)
        for request in requests
        for prompt in (request.text, *request.paraphrases, *(n.prompt for n in request.neighbours))
        for target in (request.target_new, request.target_true or request.target_new)
    ]
    prompts, targets = [prompt for prompt, _ in asked], [target for _, target in asked]
    naive, expected = once(lambda: naive_scores(adapter, prompts, targets))
    seconds, found = once(lambda: score_targets(adapter, prompts, targets))
    worst = max(abs(score.log_prob - one) for score, one in zip(found, expected, strict=True))
    return [
        "",
        f"| metrics of {len(requests)} requests, {len(asked)} answers | seconds | speed-up | largest difference |",
        "|---|---|---|---|",
        f"| one at a time | {naive:.2f} | 1 | |",
        f"| in batches | {seconds:.2f} | {naive / seconds:.1f} | {worst:.0e} |",
    ]


def growth(
    folder: str | None, layer: int, requests: list[EditRequest], machine: Machine, counts: list[int], steps: int
) -> list[str]:
    """Seconds and memory by the number of requests; each in a process of its own."""
    lines = [
        "",
        f"| requests | search, {steps} bf16 steps | a request | peak memory, MB | above the model's | padding "
        f"| keys of a layer | solve | metrics of up to {MEASURED} |",
        "|---" * 9 + "|",
    ]
    for count in counts:
        many = (requests * (count // len(requests) + 1))[:count]
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as fresh:
            seconds, memory, padding, others = fresh.submit(_grown, folder, layer, many, machine, steps).result()
        megabytes = [f"{x / 1e6:.0f}" for x in memory]
        shown = [f"{seconds:.2f}", f"{seconds / count:.3f}", *megabytes, f"{padding:.0%}"]
        lines.append(f"| {count:,} | " + " | ".join([*shown, *(f"{phase.seconds:.3f}" for phase in others)]) + " |")
    return lines


def _grown(
    folder: str | None, layer: int, requests: list[EditRequest], machine: Machine, steps: int
) -> tuple[float, tuple[float, float], float, list[Phase]]:
    adapter = load(folder)
    for weight in adapter.model.parameters():
        weight.sum()  # so that what is mapped from the file counts as the model's
    tail, rows = Tail(adapter, layer, torch.bfloat16), search_rows(adapter, requests, TEMPLATES)
    seconds = 0.0

    def search() -> None:
        nonlocal seconds
        seconds, _ = once(lambda: search_values(adapter, tail, rows, ValueSearch(steps=steps)))

    memory = peak_memory(search)
    keys, _, solve = keys_and_solve(adapter, layer, requests, machine)
    others = [keys, solve, measuring(adapter, requests[:MEASURED], machine)]
    return seconds, memory, padding_share(rows, ValueSearch().together, budget_of(adapter.device)), others


def widths(adapter: Adapter, machine: Machine, chosen: list[int]) -> list[str]:
    """Seconds and share of the bound for 16 requests in random LLaMA models of 4 layers, by their width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    requests, rows = read_requests(FACTS)[:16], {}
    for width in chosen:
        config = LlamaConfig(
            vocab_size=len(adapter.tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
        )
        grown = adapter_for(LlamaForCausalLM(config).eval().requires_grad_(False), adapter.tokenizer)
        rows[width] = [
            searching(grown, 1, requests, machine, torch.float32, ValueSearch(steps=3)),
            *keys_and_solve(grown, 1, requests, machine),
            adding_up(4 * width, machine),
            rect(4 * width**2, machine, turns=3)[0],
            measuring(grown, requests, machine),
        ]
    names = [
        "search, 3 fp32 steps",
        "keys of a layer",
        "factor of C",
        "solve",
        "moments of 4,096 keys",
        "RECT",
        "metrics",
    ]
    return [
        "",
        "| width | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {width} | " + " | ".join(f"{p.seconds:.3f} ({p.bound / p.seconds:.0%})" for p in found) + " |"
            for width, found in rows.items()
        ),
    ]


def with_tables(page: str, tables: str) -> str:
    """A page with its tables replaced, or these at its end: what is written around them stays."""
    if (BEGIN in page) != (END in page):
        raise ValueError(f"The page has only one of {BEGIN} and {END}, so what is around its tables cannot be told.")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2] or chr(10)}"


def load(folder: str | None) -> Adapter:
    """The model of a folder, or SmolLM2 as the shipped configuration names it."""
    if folder is not None:
        return adapter_for(*Source(name=folder).load())
    config = yaml.safe_load((configs_folder() / "memit_smollm2.yaml").read_text())
    return adapter_for(*Source(**config["model"]["init_args"]["base"]).load())


def main(arguments: list[str] | None = None) -> None:
    """Run all benchmarks and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; SmolLM2 if not given")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 7, 8, 9, 10])
    parser.add_argument("--requests", default=str(FACTS), help="file of requests; the shipped facts if not given")
    parser.add_argument("--count", type=int, default=100, help="requests of the operation")
    parser.add_argument("--naive", type=int, default=0, help="requests to search in public code's way as well")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text for the second moments")
    parser.add_argument("--growth-steps", type=int, default=3, help="steps of the search by the number of requests")
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 10, 16, 64, 100, 1000], help="numbers of requests")
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024, 2048], help="of random models")
    parser.add_argument(
        "--out",
        type=Path,
        help="file for the tables, where other tables of this kind are replaced; printed if not given",
    )
    args = parser.parse_args(arguments)
    adapter = load(args.model)
    requests = read_requests(args.requests)[: args.count]
    machine = Machine(fp32=matrix_speed(torch.float32), bf16=matrix_speed(torch.bfloat16), memory=memory_speed())
    lines = [
        f"On {description()}: {machine.fp32 / 1e9:.0f} GFLOP/s in fp32, {machine.bf16 / 1e9:.0f} in bf16, "
        f"{machine.memory / 1e9:.0f} GB/s. {len(requests)} requests, {len(TEMPLATES)} prefixes, layers {args.layers}.",
        "",
        "| phase | seconds | bound | of the bound |",
        "|---|---|---|---|",
        *(phase.row() for phase in phases(adapter, args.layers, requests, machine)),
    ]
    if args.naive:
        lines += against_naive(adapter, args.layers[-1], requests[: args.naive])
        lines += metrics_against_naive(adapter, requests[: args.naive][:10])
    lines += moments_against_bare(adapter, args.layers, args.tokens)
    lines += growth(args.model, args.layers[-1], requests, machine, args.growth, args.growth_steps)
    lines += widths(adapter, machine, args.widths)
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(with_tables(args.out.read_text() if args.out.exists() else "", text))
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
