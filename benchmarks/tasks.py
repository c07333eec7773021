"""What a model scores in the tasks, how long that takes, and how much longer one record at a time would.

    python -m benchmarks.tasks --limit 100 --precision bf16 --alone 10 --out tasks.md    # data sets from the hub
    python -m benchmarks.tasks --tasks gsm8k rte --path gsm8k=gsm8k_test.jsonl rte=rte_train.jsonl

With ``--alone N`` the first N records are also asked one at a time with the plain model's own ``generate``, each prompt by
itself, in the same precision, and options by a forward pass each. ``--outputs FILE`` keeps every prompt and raw text.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.machine import description
from benchmarks.output import write
from benchmarks.speed import load
from rect_lightning.models import Adapter
from rect_lightning.tasks import PromptTask, Task, TaskResult, measure, named
from rect_lightning.tasks.task import running_in

ABILITIES = ["gsm8k", "rte", "nq", "boolq", "mutual", "samsum", "conll2003", "sst2"]


@torch.no_grad()
def one_at_a_time(adapter: Adapter, task: PromptTask, records: list, scoring: str) -> float:
    """Seconds of the same prompts by the plain model, each alone, without stop strings."""
    paper, standard = scoring != "standard", scoring != "paper"
    start = perf_counter()
    for record in records:
        asked = dict.fromkeys(task.prompts(record) if standard else [], task.max_new_tokens)
        for prompt in task.paper_prompts(record) if paper else []:
            asked[prompt] = max(task.paper_tokens, asked.get(prompt, 0))
        for prompt, tokens in asked.items():
            inputs = adapter.tokenizer(prompt, return_tensors="pt")
            adapter.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        for option in task.options(record) if standard else []:
            text = f"{task.prompts(record)[0]} {option}"
            adapter.model(**adapter.tokenizer(text, return_tensors="pt")).logits.log_softmax(-1)
    return perf_counter() - start


def row(result: TaskResult, seconds: float, alone: str) -> str:
    scores = ", ".join(
        f"{name.partition('/')[2]} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
        for name, score in result.scores.items()
    )
    unparseable = "" if result.unparseable is None else f"{result.unparseable:.2f}"
    return f"| {result.task} | {result.n} | {scores} | {unparseable} | {seconds:.1f} | {alone} |"


def main(arguments: list[str] | None = None) -> None:
    """Measure the tasks one after the other and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; SmolLM2 if not given")
    parser.add_argument("--tasks", nargs="+", default=ABILITIES)
    parser.add_argument("--path", nargs="*", default=[], metavar="TASK=FILE", help="files in place of hub data sets")
    parser.add_argument("--limit", type=int, default=100, help="records of each task")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--scoring", choices=["paper", "standard", "both"], default="both", help="which scores")
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--alone", type=int, default=0, help="records to ask one at a time as well")
    parser.add_argument("--out", type=Path, help="file for the table; printed if not given")
    parser.add_argument("--outputs", type=Path, help="file for all prompts and raw texts, JSONL")
    args = parser.parse_args(arguments)
    paths = dict(item.split("=", 1) for item in args.path)
    tasks: list[Task] = [
        type(named(name))(path=paths[name]) if name in paths else named(name)  # type: ignore[call-arg]
        for name in args.tasks
    ]
    for task in tasks:
        task.prepare(args.limit)
    adapter = load(args.model)
    lines = [
        f"On {description()}, {args.precision}.",
        "",
        "| task | n | scores, 95 % interval | unparseable | seconds | one at a time, times longer |",
        "|---|---|---|---|---|---|",
    ]
    total, outputs = 0.0, []
    for task in tasks:
        start = perf_counter()
        result = measure(
            adapter,
            task,
            limit=args.limit,
            scoring=args.scoring if isinstance(task, PromptTask) else "both",
            precision=args.precision,
            tokens_per_batch=args.tokens_per_batch,
        )
        seconds = perf_counter() - start
        total += seconds
        alone = ""
        if args.alone and isinstance(task, PromptTask):
            records = [record for _, record in task.records[: min(args.alone, result.n)]]
            with running_in(adapter, torch.bfloat16) if args.precision == "bf16" else nullcontext():
                alone = f"{one_at_a_time(adapter, task, records, args.scoring) / len(records) * result.n / seconds:.1f}"
        lines.append(row(result, seconds, alone))
        for output in result.outputs:
            told = {"task": task.name, "prompts": output.prompts, "texts": output.texts, "answer": str(output.answer)}
            outputs.append(
                json.dumps(told | {"parts": {k: str(v) for k, v in output.parts.items()}}, ensure_ascii=False)
            )
    lines += ["", f"{total:.0f} s in all."]
    text = "\n".join(lines) + "\n"
    if args.outputs:
        args.outputs.write_text("".join(f"{line}\n" for line in outputs), encoding="utf-8")
    write(text, args.out)


if __name__ == "__main__":
    main()
