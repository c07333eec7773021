"""Measuring an editor's requests, before and after, in one go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rect_lightning.data.prose import prose_path
from rect_lightning.data.request import EditRequest
from rect_lightning.metrics import EditMetrics, RequestScores, perplexity, request_metrics
from rect_lightning.solving.change_profile import BINS, HIGH, LOW, change_profile

if TYPE_CHECKING:
    from rect_lightning.editors.base import Editor


class Measurement:
    """Accumulates the metrics of the clean and of the edited model over the same requests.

    Both are measured on the same prompts, with the clean weights swapped in for the one, so "before" cannot be the edited
    model, nor another selection of requests. Each is asked once about a request: the clean model in all, the edited one as
    long as its weights stay.

    Args:
        samples: For how many requests to keep the raw continuations.
    """

    def __init__(self, samples: int = 5) -> None:
        self.before, self.after = EditMetrics(), EditMetrics()
        self.samples: list[dict[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self._wanted = samples

    def add(self, editor: Editor, requests: Sequence[EditRequest]) -> None:
        """Measure requests on the editor's model as it stands, and clean; of several processes, each measures its share."""
        mine = editor.processes.mine(requests)
        shown = requests[: self._wanted - len(self.samples)] if editor.processes.is_first else []
        with editor.processes.together():
            clean = editor.scored.clean(editor, mine)
            after = editor.scored.now(editor, mine)
            self.before.to(editor.device).update(clean, clean)
            self.after.to(editor.device).update(after, clean)
            continuations = editor.continuations([r.text for r in shown]) if shown else []
        each = zip(mine, request_metrics(clean, clean), request_metrics(after, clean), clean, after, strict=True)
        self.requests += editor.processes.gather(
            [
                {"id": r.id, "text": r.text, "target_new": r.target_new, **_answers(*scores), "before": b, "after": a}
                for r, b, a, *scores in each
            ]
        )
        self.samples += [
            {"request": f"{request.text} → {request.target_new}", **sample}
            for request, sample in zip(shown, continuations, strict=True)
        ]

    def compute(self) -> dict[str, dict[str, float]]:
        """``{"before": {name: value}, "after": {name: value}}``, reduced over processes."""
        return {
            when: {name: float(value) for name, value in metrics.compute().items()}
            for when, metrics in (("before", self.before), ("after", self.after))
        }


def _answers(clean: RequestScores, after: RequestScores) -> dict[str, dict[str, str]]:
    """The free answers to a request's own prompt, where the models were asked."""
    before, now = clean.rewrite.free, after.rewrite.free
    return {} if before is None or now is None else {"answers": {"before": before.text, "after": now.text}}


def with_perplexity(editor: Editor, results: dict[str, dict[str, float]], prose: str) -> dict[str, dict[str, float]]:
    """Results with the perplexity of a text, ``perplexity/<name of the file>``, under the clean and the edited weights."""
    with editor.processes.together():
        path = prose_path(prose)
        text, name = path.read_text(encoding="utf-8"), f"perplexity/{path.stem}"
    context = min(512, editor.model.context_length)
    options: dict[str, Any] = {"context": context, "show_progress": editor.show_progress, "processes": editor.processes}
    told = {"perplexity": text, "context": context}
    before = editor.of_clean(told, lambda: perplexity(editor.model, text, **options))
    after = perplexity(editor.model, text, **options)
    return {"before": {**results["before"], name: before}, "after": {**results["after"], name: after}}


def relative_changes(editor: Editor) -> dict[str, Any]:
    """How the relative changes since the clean model are distributed, a `ChangeProfile` for each edited layer that moved."""
    layers = []
    for layer in editor.layers:
        weight = editor.model.weight(layer).detach()
        clean = editor.clean[layer].to(weight.device)
        if not torch.equal(weight, clean):
            profile = dataclasses.asdict(change_profile(weight - clean, clean))
            layers.append({"layer": layer, "weight": f"{editor.model.projection_name(layer)}.weight", **profile})
    return {"log10_low": LOW, "log10_high": HIGH, "bins": BINS, "layers": layers} if layers else {}
