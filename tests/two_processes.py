"""``python -m tests.two_processes FOLDER HYPERNETWORK``: edits under DDP in two processes, which leave ``rank-0.pt`` and
``rank-1.pt`` in the folder.

What is run is also what `tests/test_processes.py` runs in its own process, to compare.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rect_lightning.callbacks import RECT, SideEffects
from rect_lightning.editors import locate_then_edit, measure
from rect_lightning.editors.base import Editor
from rect_lightning.editors.scored import Scored
from rect_lightning.processes import Processes
from rect_lightning.solving import corpus, moment_files, moments
from rect_lightning.solving.corpus import Moments
from rect_lightning.solving.moments import second_moments
from rect_lightning.tasks import MultipleChoice, Perplexity
from tests import tiny
from tests.editors.test_base import PROSE, facts, fit, memit, requests, rome, trainer
from tests.editors.test_fine_tuning import fine_tuning
from tests.editors.test_knowledge_neurons import kn
from tests.editors.test_mend import mend
from tests.editors.test_ultraedit import ultraedit

DDP = {"strategy": "ddp", "devices": 2}
LAYERS = [1, 2]


@dataclass
class Pair:
    """Two rows an item, and one."""

    twice: Tensor
    once: Tensor


def pair(items):
    return Pair(torch.tensor([[10.0 * i, 10.0 * i + 1] for i in items]).reshape(-1, 1), torch.tensor(items)[:, None])


def edits(folder, hypernetwork, options):
    """Edits of every kind: their weights, metrics, samples, and the requests that this process searched for.

    MEND's are made by the checkpoint of a hypernetwork.
    """
    found = {}
    (folder / "prose.txt").write_text(PROSE[:900])
    prose = str(folder / "prose.txt")
    for name, make, batch_size in (
        ("layer", lambda: memit(folder, prose=prose), 3),  # batches of 3 and 1: uneven, and fewer than processes
        ("operation", lambda: memit(folder, step_per="operation"), 3),
        ("single", lambda: rome(folder, mode="single"), 1),
        ("neurons", lambda: kn(layers=[1, 3]), 3),
        ("gradients", ultraedit, 3),
        ("fine-tuning", lambda: fine_tuning(steps=5, lr=1e-4), 3),
        ("hypernetwork", lambda: mend(hypernetwork), 3),
    ):
        editor, searched, weights = make(), [], []
        restore, search = editor.restore, locate_then_edit.search_values

        def noting(adapter, tail, rows, *args, searched=searched, search=search, **kwargs):
            searched += [row.id for row in rows]
            return search(adapter, tail, rows, *args, **kwargs)

        def before_restoring(editor=editor, weights=weights, restore=restore):
            weights += [editor.model.weight(n).detach().clone() for n in editor.layers]
            restore()

        side = SideEffects(tasks(folder), every_n_edits=3)
        extra = [side] if name == "layer" else []
        with patch.object(locate_then_edit, "search_values", noting), patch.object(editor, "restore", before_restoring):
            # a large share, since with fewer entries kept one at the edge may fall on either side
            run = fit(
                editor, facts(folder, batch_size=batch_size), RECT(0.95), *extra, default_root_dir=folder, **options
            )
        weights += [editor.model.weight(n).detach().clone() for n in editor.layers]
        logged = {k: float(v) for k, v in run.callback_metrics.items() if k.startswith(("before/", "after/"))}
        found[name] = {
            "weights": weights, "results": editor.results, "samples": editor.measurement.samples, "done": editor.done,
            "searched": searched, "logged": logged, "side": side.rows,
        }  # fmt: skip
        if name == "layer":
            [found["predictions"]] = run.predict(
                editor, datamodule=facts(folder, prompts=["The sport of LeBron James"])
            )
    return found


def tasks(folder):
    """Three questions and a text, of which each process asks and reads its share."""
    path = folder / "told.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": "it"}) + "\n" for q in ("I think so", "You", "The sport of")))
    told = MultipleChoice(name="told", path=str(path), prompt="{q}", options=["it", "so"], answer="a")
    return [told, Perplexity(path=str(folder / "prose.txt"), context=64)]


def text(folder):
    path = folder / "text of moments.txt"
    path.write_text(PROSE)
    return Moments(source=str(path), tokens=410, context=16)


def patched_sizes():
    return patch.object(moments, "_BATCH_TOKENS", 64), patch.object(corpus, "_SAMPLED_TOGETHER", 8)


def passes(folder, processes):
    """Second moments from text and from samples, and how many tokens this process ran through the model."""
    found = {}
    small_batches, small_groups = patched_sizes()
    with small_batches, small_groups:
        for name, source in (("text", text(folder)), ("self", Moments(tokens=410, context=16))):
            adapter, ran = tiny.adapter("llama"), []
            adapter.blocks[0].register_forward_pre_hook(
                lambda _m, args, ran=ran: ran.append(args[0].shape[:2].numel()) if args[0].shape[1] > 1 else None
            )
            c = second_moments(
                adapter, LAYERS, source, fingerprint="f", cache=folder / "moments", save_every=0, processes=processes
            )
            found[name] = {"moments": c, "tokens": sum(ran)}
    return found


def stopped_pass(folder, processes):
    """A pass that stops in both processes, with a state saved."""
    rows = corpus.token_rows

    def some(*args, **kwargs):
        for number, row in enumerate(rows(*args, **kwargs)):
            if number == 17:
                raise KeyboardInterrupt
            yield row

    small_batches, _ = patched_sizes()
    with small_batches, patch.object(corpus, "token_rows", some):
        try:
            second_moments(
                tiny.adapter("llama"), LAYERS, text(folder), fingerprint="f", cache=folder / "stopped", save_every=0,
                processes=processes,
            )  # fmt: skip
        except KeyboardInterrupt:
            return True
    return False


def refusals(folder, processes):
    """What is told where the processes are handed different requests, and where one of them fails."""
    told = {}
    try:
        trainer(**DDP).fit(memit(folder), DataLoader(requests(), batch_size=2, collate_fn=list))
    except RuntimeError as error:
        told["loader"] = str(error)

    def fails(*_args, **_kwargs):
        raise ValueError("out of luck")

    editor = memit(folder)
    search = fails if processes.rank == 1 else locate_then_edit.search_values
    with patch.object(locate_then_edit, "search_values", search):
        try:
            fit(editor, facts(folder), **DDP)
        except (RuntimeError, ValueError) as error:
            told["failure"] = f"{type(error).__name__}: {error}"
    told["clean"] = editor.is_clean()
    return told


def local_failures(folder, processes):
    """What is told where one process alone, whose rank is given, fails in what no other is asked about."""
    editor, told = memit(folder), {}

    def second(source, **options):
        options = {"fingerprint": "f", "processes": processes, "save_every": 1e9, "cache": folder / "failed"} | options
        second_moments(editor.model, LAYERS, source, **options)

    def measured():
        measure.Measurement().add(editor, requests())

    def perplexity():
        measure.with_perplexity(editor, {"before": {}, "after": {}}, str(folder / "prose.txt"))

    def fails(*_args, **_kwargs):
        raise ValueError("out of luck")

    sampled = Moments(tokens=410, context=16)
    cases = {
        "continuations": (0, Editor, "continuations", measured),
        "metrics": (1, Scored, "now", measured),
        "prose": (1, measure, "prose_path", perplexity),
        "perplexity": (0, sys.modules["rect_lightning.metrics.perplexity"], "hidden_states", perplexity),
        "source": (1, corpus, "identity", lambda: second(text(folder))),
        "cached": (0, moments, "_cached", lambda: second(text(folder))),
        "cache": (0, Path, "mkdir", lambda: second(text(folder), cache=folder / "none")),
        "resume": (0, moments, "_restore", lambda: second(text(folder))),
        "text": (1, corpus, "_documents", lambda: second(text(folder))),
        "sampling": (0, corpus, "_sample", lambda: second(sampled)),
        "state": (0, moment_files, "write", lambda: second(text(folder), save_every=0)),
        "result": (0, moment_files, "write", lambda: second(text(folder))),
    }
    for name, (rank, owner, attribute, call) in cases.items():
        broken = fails if processes.rank == rank else getattr(owner, attribute)
        with patch.object(Editor, "processes", processes), patch.object(owner, attribute, broken):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                told[name] = rank, f"{type(error).__name__}: {error}"
    return told


def main(folder, hypernetwork):
    os.environ["RECT_LIGHTNING_CACHE"] = str(folder / "cache")
    found = {"edits": edits(folder, hypernetwork, DDP)}
    processes = Processes(rank=int(os.environ["LOCAL_RANK"]), count=2)
    found["map"] = {n: vars(processes.map(list(range(n)), pair)) for n in range(1, 6)}
    found["sum"] = processes.sum(torch.tensor([1.0, processes.rank]))
    found["agree"] = processes.agree(("rank", processes.rank))
    found["all_have"] = processes.all_have("same"), processes.all_have(processes.rank)
    found["passes"] = passes(folder, processes)
    found["stopped"] = stopped_pass(folder, processes)
    found["refusals"] = refusals(folder, processes)
    found["local failures"] = local_failures(folder, processes)
    torch.save(found, folder / f"rank-{processes.rank}.pt")
    processes.agree("done")  # the first one's end is the end of all


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
