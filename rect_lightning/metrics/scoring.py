"""How likely a model finds given targets after given prompts, teacher-forced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rect_lightning.metrics.forward import check_lengths, hidden_states, measuring, token_log_probs
from rect_lightning.models.encoding import encode
from rect_lightning.progress import track
from rect_lightning.solving.batching import by_length

if TYPE_CHECKING:
    from rect_lightning.models import Adapter


@dataclass(frozen=True, slots=True)
class TargetScore:
    """What a model makes of one target after one prompt, each token of the target after the true ones before it.

    Attributes:
        log_prob: Mean log-likelihood of the target's tokens, in nats.
        target: The target's token ids.
        predicted: The likeliest token id at each place of the target.
    """

    log_prob: float
    target: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every token of the target is the likeliest one."""
        return self.predicted == self.target

    @property
    def token_accuracy(self) -> float:
        """The share of the target's tokens that are the likeliest ones."""
        return fmean(p == t for p, t in zip(self.predicted, self.target, strict=True))


def score_targets(
    adapter: Adapter,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    tokens_per_batch: int = 1024,
    show_progress: bool = False,
) -> list[TargetScore]:
    """Score each target after its prompt, in as little work as gives the same numbers as one prompt at a time.

    A target's last token is never run, rows that begin another row are read off that row (a prompt with two one-token
    targets is one row), rows of like length share a batch, and logits are computed only where a target is predicted.

    Args:
        adapter: The model and its tokenizer.
        prompts: The texts before the targets.
        targets: As many targets, without a leading space.
        tokens_per_batch: Tokens of a padded batch. More needs more memory, and was slower on a CPU.
        show_progress: Whether to show a bar over the batches.

    Returns:
        One score a pair, in the order given.

    Raises:
        ValueError: Not as many targets as prompts, nothing before a target, or a text that the model's context cannot
            hold; raised before the model runs.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"Each prompt needs one target, got {len(prompts)} prompts and {len(targets)} targets.")
    rows = encode(adapter.tokenizer, prompts, targets)
    check_lengths(adapter, [len(row.ids) - 1 if row.target else 0 for row in rows], prompts)
    hosts = _hosts([row.ids[:-1] for row in rows])
    guests = defaultdict(list)
    for i, host in enumerate(hosts):
        guests[host].append(i)
    inputs = list(guests)

    log_probs: list[list[float]] = [[] for _ in rows]
    predicted: list[list[int]] = [[] for _ in rows]
    batches = by_length([len(ids) for ids in inputs], tokens_per_batch)
    with measuring(adapter.model):
        for batch in track(batches, "Scoring", show=show_progress, unit="batch"):
            longest = len(inputs[batch[0]])
            places = sorted(  # by state, so that targets of one prompt share the projection of their first place
                (number * longest + place - 1, i, rows[i].ids[place])
                for number, host in enumerate(batch)
                for i in guests[inputs[host]]
                for place in range(rows[i].target, len(rows[i].ids))
            )
            states, owners, tokens = zip(*places, strict=True)
            hidden = hidden_states(adapter, [inputs[host] for host in batch])
            values, likeliest = token_log_probs(adapter, hidden.flatten(0, 1), states, tokens)
            for i, value, token in zip(owners, values.tolist(), likeliest.tolist(), strict=True):
                log_probs[i].append(value)
                predicted[i].append(token)
    return [
        TargetScore(fmean(log_probs[i]), target=row.target_ids, predicted=tuple(predicted[i]))
        for i, row in enumerate(rows)
    ]


def _hosts(inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each row a row that begins with it, as few different ones as there can be."""
    hosts: dict[tuple[int, ...], tuple[int, ...]] = {}
    host: tuple[int, ...] = ()
    # sorted, whatever begins with a row follows it directly
    for ids in sorted(set(inputs), reverse=True):
        if host[: len(ids)] != ids:
            host = ids
        hosts[ids] = host
    return [hosts[ids] for ids in inputs]
