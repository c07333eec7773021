"""Perplexity of a text."""

# No `from __future__ import annotations`: the command line reads the types of the constructor.

from math import exp

from rect_lightning.data.prose import prose_path
from rect_lightning.metrics.perplexity import chunk_losses
from rect_lightning.models import Adapter
from rect_lightning.tasks.scores import Ratio, Score, summarise
from rect_lightning.tasks.task import How, Task, TaskResult


class Perplexity(Task):
    """Perplexity of a text, read in chunks that do not overlap; see `rect_lightning.metrics.perplexity`.

    The paper does not measure it: there is one score, ``perplexity/<name of the file>``, whatever the scoring. Its interval
    is that of the mean loss over resampled chunks. ``limit`` is in records of the other tasks, and has no say here.

    Args:
        path: A text file, or "prose" for the one that comes with this package.
        context: Tokens of a chunk, at most; fewer where the model reads fewer.
        tokens: Read so many tokens from the start of the text; null for all.
    """

    name = "perplexity"

    def __init__(self, *, path: str = "prose", context: int = 512, tokens: int | None = None) -> None:
        self.path, self.context, self.tokens = path, context, tokens

    def prepare(self, limit: int | None = None) -> None:
        """See that the file is there."""
        prose_path(self.path, option="tasks.Perplexity.path")

    def asked(self, limit: int | None) -> str:
        """The text."""
        return prose_path(self.path, option="tasks.Perplexity.path").read_text(encoding="utf-8")

    def run(self, adapter: Adapter, how: How) -> TaskResult:
        """Read the text."""
        path = prose_path(self.path, option="tasks.Perplexity.path")
        losses, counts = chunk_losses(
            adapter,
            self.asked(None),
            context=min(self.context, adapter.context_length),
            limit=self.tokens,
            processes=how.processes,
            show_progress=how.show_progress,
        )
        parts = [Ratio((loss,), (count,)) for loss, count in zip(losses.tolist(), counts.tolist(), strict=True)]
        loss, name = summarise(parts), f"perplexity/{path.stem}"
        score = Score(value=exp(loss.value), low=exp(loss.low), high=exp(loss.high))
        return TaskResult(
            task=self.name, scores={name: score}, n=len(parts), unparseable=None, main=name, lower_is_better=True
        )
