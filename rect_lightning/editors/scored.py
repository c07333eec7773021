"""What an editor's model makes of requests, clean and as it stands, each asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rect_lightning.data.request import EditRequest
from rect_lightning.metrics import SCORES, RequestScores, Wild, evaluate
from rect_lightning.models.fingerprint import content_digest

if TYPE_CHECKING:
    from rect_lightning.editors.base import Editor

_Known = dict[tuple[EditRequest, Wild | None], RequestScores]


class Scored:
    """Scores of requests, as `evaluate` gives them, in full precision; kept by request and by how it is asked.

    Those of the model as it stands hold until its weights change, so that what has been asked at the last edits is not
    asked again at the end.
    """

    def __init__(self) -> None:
        self._clean: _Known = {}
        self._now: _Known = {}
        self._weights = ""

    def clean(self, editor: Editor, requests: Sequence[EditRequest]) -> list[RequestScores]:
        """What the clean model makes of them."""

        def ask(new: Sequence[EditRequest]) -> list[RequestScores]:
            told = {"requests": [asdict(request) for request in new], "wild": editor.wild and asdict(editor.wild)}
            return editor.of_clean(told, lambda: _ask(editor, new), SCORES)

        return _each_once(self._clean, editor.wild, requests, ask)

    def now(self, editor: Editor, requests: Sequence[EditRequest]) -> list[RequestScores]:
        """What the model makes of them as it stands; `begin` first."""
        return _each_once(self._now, editor.wild, requests, lambda new: _ask(editor, new))

    def begin(self, editor: Editor) -> None:
        """Forget what models of other weights made of requests."""
        weights = content_digest({layer: editor.model.weight(layer) for layer in editor.layers})
        if weights != self._weights:
            self._now, self._weights = {}, weights

    def forget(self) -> None:
        """The weights are about to change."""
        self._now, self._weights = {}, ""


def _ask(editor: Editor, requests: Sequence[EditRequest]) -> list[RequestScores]:
    with editor.full_precision():
        return evaluate(editor.model, requests, wild=editor.wild, show_progress=editor.show_progress)


def _each_once(
    known: _Known,
    wild: Wild | None,
    requests: Sequence[EditRequest],
    ask: Callable[[Sequence[EditRequest]], list[RequestScores]],
) -> list[RequestScores]:
    new = [request for request in requests if (request, wild) not in known]
    if new:
        known |= {(request, wild): score for request, score in zip(new, ask(new), strict=True)}
    return [known[request, wild] for request in requests]
