"""A small grid's folder, a run folder, and what is in them."""

from __future__ import annotations

import csv
import json
import random

REGULARISERS = {"none": (0.97, 0.55), "RECT 40": (0.95, 0.86), "RECT 20": (0.72, 0.93), "Random 40": (0.48, 0.95)}
COLUMNS = ["editor", "regulariser", "seed", "edits", "source", "name", "value", "low", "high", "n", "unparseable"]


def grid_rows(editors=("ROME", "MEMIT"), seeds=(0, 1, 2)):
    """Lines of a grid's table, made up but for their form."""
    random.seed(0)
    for editor in editors:
        for regulariser, (edited, kept) in REGULARISERS.items():
            kept = kept if editor == "ROME" else (kept + 1) / 2
            for seed in seeds:
                cell = (editor, regulariser, seed)

                def noise(scale=0.02):
                    return random.gauss(0, scale)

                for source, edits in (("before", 0), ("after", 20)):
                    for metric, share in (("efficacy", 1.0), ("generalisation", 0.88)):
                        for kind, part in (("probability", 1.0), ("exact", 0.8)):
                            value = edited * share * part + noise() if edits else 0.1 * part
                            yield *cell, edits, source, f"{metric}/{kind}", value, "", "", 50, ""
                    locality = 0.9 if not edits else 0.9 - 0.2 * edited + noise()
                    yield *cell, edits, source, "locality/probability", locality, "", "", 50, ""
                    score = 3 / (1 / (edited + noise()) + 1 / (0.88 * edited) + 1 / locality) if edits else 0.12
                    yield *cell, edits, source, "score/probability", score, "", "", "", ""
                    yield *cell, edits, source, "perplexity/prose", 33 / kept if edits else 33.0, "", "", "", ""
                for edits in (0, 5, 10, 15, 20):
                    left = kept ** (edits / 20 * 1.6)
                    for task, start in (
                        ("gsm8k/standard/exact", 0.31),
                        ("sst2/standard/option", 0.86),
                        ("sst2/paper", 0.7),
                    ):
                        value = start * left + (noise(0.015) if edits else 0)
                        yield *cell, edits, "task", task, value, value - 0.08, value + 0.08, 100, 0.02
                    yield *cell, edits, "task", "perplexity/prose", 33 / left**3, "", "", 5, ""
                    if edits:
                        yield *cell, edits, "edits", "efficacy/probability", edited * left**0.3, "", "", edits, ""
                    for layer in (6, 7, 8):
                        moved = edits / 20 * (0.7 if regulariser == "none" else 0.4) * layer / 8
                        yield *cell, edits, "change", f"{layer}/above_0.077", moved, "", "", "", ""
                yield *cell, 20, "cost", "seconds", 41 + noise(1), "", "", "", ""


def write_grid(folder, rows=None, columns=COLUMNS):
    """A grid's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(grid_rows() if rows is None else rows)
    return folder


_METRICS = ("efficacy/probability", "efficacy/exact", "locality/probability", "perplexity/prose")
RESULTS = {
    "before": dict(zip(_METRICS, (0.125, 0.0, 0.875, 32.959), strict=True)),
    "after": dict(zip(_METRICS, (0.96875, 0.9375, 0.8125, 33.206), strict=True)),
}  # fmt: skip
PROMPT = 'Say <script>alert("x")</script> & "so" $x^2$ → {{ 7 * 7 }}'


def write_run(folder):
    """A run folder with all its files."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {
        "editor": "MEMIT", "mode": "sequential", "operations": 2, "requests": [str(i) for i in range(8)],
        "config": {"regularisers": [{"callback": "rect_lightning.callbacks.rect.RECT", "keep": 0.4}]},
    }  # fmt: skip
    counts = [0] * 40 + [100 + 10 * i for i in range(40)] + [0] * 40
    layers = [
        {
            "layer": layer, "weight": f"h.{layer}.weight", "entries": 3 * sum(counts), "zero": 2 * sum(counts), "below": 0,
            "counts": counts, "above": 0, "thresholds": {"0.2": 0.03, "0.4": None, "0.6": 0.0, "0.8": 0.0},
            "norm": 1.0, "weight_norm": 20.0,
        }
        for layer in (6, 7)
    ]  # fmt: skip
    layers[0]["thresholds"]["0.4"] = 0.00125
    requests = [{"id": str(i), "before": RESULTS["before"], "after": RESULTS["after"]} for i in range(8)]
    files = {
        "metrics.json": RESULTS,
        "requests.json": requests,
        "provenance.json": provenance,
        "samples.json": [{"request": PROMPT, "prompt": "Say", "before": " it <b>now</b>", "after": " it\nso"}],
        "relative_change.json": {"log10_low": -8.0, "log10_high": 4.0, "bins": 120, "layers": layers},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "config.yaml").write_text("# <script>config</script>\nmodel: {layers: [6, 7]}\n", encoding="utf-8")
    (folder / "metrics.csv").write_text(
        "after/efficacy/exact,change/6/above_0.077,change/7/above_0.077,change/6/manhattan,edit/requests\n"
        ",0.11,0.21,5.5,4.0\n,0.12,0.22,6.5,8.0\n0.9375,,,,\n",
        encoding="utf-8",
    )
    (folder / "side_effects.csv").write_text(
        "edits,task,score,value,low,high,n,unparseable\n"
        "0,sst2,sst2/paper,0.5,0.25,0.75,15,0.1\n0,sst2,sst2/option,0.8125,0.55,0.95,15,0.1\n"
        "4,sst2,sst2/paper,0.5,0.25,0.75,15,0.1\n4,sst2,sst2/option,0.6875,0.45,0.85,15,0.1\n"
        "4,edits,efficacy/probability,1.0,,,4,\n8,sst2,sst2/option,0.59375,0.35,0.8,15,0.1\n"
        "8,edits,efficacy/probability,0.96875,,,8,\n",
        encoding="utf-8",
    )
    return folder
