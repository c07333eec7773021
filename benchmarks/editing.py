"""Edit CounterFact records with every variant below on SmolLM2, and write what came out as a Markdown table.

    python -m benchmarks.editing counterfact.jsonl wikipedia.txt heldout.txt --out docs/editing.md

The records are CounterFact's (``azhx/counterfact`` on the hub, as JSON lines), the texts any prose: the first for the second
moments, the second for perplexity. Each variant is one run of the command line, kept under ``--runs`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.output import write

COLUMNS = {
    "efficacy": "efficacy/probability",
    "exact": "efficacy/exact",
    "generalisation": "generalisation/probability",
    "exact ": "generalisation/exact",
    "locality": "locality/probability",
    "perplexity": "perplexity/{prose}",
}
BF16 = ["--trainer.precision", "bf16-mixed"]
NONE = ["--trainer.callbacks", "null"]
END = ["--model.step_per", "operation"]
C512 = ["--model.moments.context", "512"]
MORE = ["--model.search.steps", "25", "--model.moments_weight", "700"]
SELF = ["--model.moments.source", "self", "--model.moments.context", "128", "--model.moments.tokens"]
MEMIT = ["memit_smollm2.yaml", "--data.limit", "100", "--data.batch_size", "100"]
ROME = ["rome_smollm2.yaml", "--data.limit", "100", *BF16]
VARIANTS = {
    "MEMIT": [*MEMIT, *NONE],
    "MEMIT, search in bf16": [*MEMIT, *NONE, *BF16],
    "MEMIT + RECT 40, layer by layer": MEMIT,
    "MEMIT + RECT 40, at the end": [*MEMIT, *END],
    "MEMIT, C from contexts of 512": [*MEMIT, *NONE, *C512],
    "MEMIT + RECT 40, layer by layer, C from contexts of 512": [*MEMIT, *C512],
    "MEMIT + RECT 40, at the end, C from contexts of 512": [*MEMIT, *END, *C512],
    "MEMIT, 25 steps and λ = 700": [*MEMIT, *NONE, *BF16, *MORE],
    "MEMIT + RECT 40, layer by layer, 25 steps and λ = 700": [*MEMIT, *BF16, *MORE],
    "MEMIT + RECT 40, at the end, 25 steps and λ = 700": [*MEMIT, *END, *BF16, *MORE],
    "MEMIT, C from 10 k self-sampled tokens": [*MEMIT, *NONE, *BF16, *SELF, "10000"],
    "MEMIT, C from 20 k self-sampled tokens": [*MEMIT, *NONE, *BF16, *SELF, "20000"],
    "ROME": [*ROME, *NONE],
    "ROME + RECT 40": ROME,
    "R-ROME": [*ROME, *NONE, "--model.key", "mean"],
}


def run(name: str, variant: list[str], args: argparse.Namespace) -> dict:
    """Run one variant, unless its results are there, and return them."""
    folder = args.runs / name.replace(" ", "_").replace(",", "")
    results = folder / "results.json"
    if not results.exists():
        config, *options = variant
        texts = ["--model.moments.source", args.moments, "--model.moments.tokens", str(args.tokens)]
        texts += ["--model.moments.context", "256", "--model.prose", args.prose]
        log = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder)]
        command = [sys.executable, "-m", "rect_lightning", "fit", "--config", config, "--data.path", args.counterfact]
        start = time.perf_counter()
        subprocess.run([*command, *texts, *options, *log, "--trainer.enable_progress_bar", "false"], check=True)
        seconds = time.perf_counter() - start
        (found,) = folder.rglob("metrics.json")
        results.write_text(json.dumps({**json.loads(found.read_text()), "seconds": seconds}, indent=2))
    return json.loads(results.read_text())


def table(found: dict[str, dict], prose: str) -> str:
    """The results as a Markdown table, the clean model first."""
    names = {title: name.format(prose=prose) for title, name in COLUMNS.items()}
    first = next(iter(found.values()))
    rows = {"before": first["before"], **{variant: results["after"] for variant, results in found.items()}}
    lines = ["| | " + " | ".join(title.strip() for title in names) + " |", "|---" * (len(names) + 1) + "|"]
    for variant, values in rows.items():
        cells = [f"{values[name]:.3f}" if name in values else "" for name in names.values()]
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all variants and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counterfact", help="CounterFact records, JSON lines")
    parser.add_argument("moments", help="text for the second moments")
    parser.add_argument("prose", help="text for perplexity")
    parser.add_argument("--tokens", type=int, default=250_000, help="tokens of the text for the second moments")
    parser.add_argument("--only", nargs="*", help="run only these variants")
    parser.add_argument("--runs", type=Path, default=Path("runs/editing"))
    parser.add_argument("--out", type=Path, help="file for the table; printed if not given")
    args = parser.parse_args()
    found = {name: run(name, variant, args) for name, variant in VARIANTS.items() if not args.only or name in args.only}
    text = table(found, Path(args.prose).stem) + f"\n\nOn {platform.processor() or platform.machine()}.\n"
    write(text, args.out)


if __name__ == "__main__":
    main()
