"""A task: which records, what is asked of the model about each, and two scores of what it says."""

# No `from __future__ import annotations`: the command line reads the types of the constructors.

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch

from rect_lightning.data.records import read_records
from rect_lightning.data.request import RequestError
from rect_lightning.metrics import Continuation, continuations, continued_text, score_targets, stopping, up_to_stop
from rect_lightning.models import Adapter
from rect_lightning.models.encoding import encode
from rect_lightning.processes import Processes
from rect_lightning.tasks.scores import Ratio, Score, summarise

Record = Mapping[str, Any]
Scoring = Literal["paper", "standard", "both"]
Part = float | Ratio


@dataclass(frozen=True, kw_only=True)
class Output:
    """What came of one record.

    Attributes:
        prompts: The prompts that the texts continue.
        texts: What the model wrote after them, as it wrote it.
        answer: What was read out of the texts, None if nothing could be.
        parts: What the record adds to each score.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    answer: Any
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of a model in one task.

    Attributes:
        task: The task's name.
        scores: Score by name, such as ``gsm8k/exact``, each with a 95 % interval.
        n: How many records were asked.
        unparseable: Share of the records in whose texts no answer could be found, None where none is looked for.
        main: The score that stands for the ability.
        lower_is_better: Whether that one is better the lower it is.
        outputs: What came of each record.
    """

    task: str
    scores: dict[str, Score]
    n: int
    unparseable: float | None
    main: str
    lower_is_better: bool = False
    outputs: tuple[Output, ...] = ()

    @property
    def ability(self) -> float:
        """The main score, as a number that is better the higher it is."""
        value = self.scores[self.main].value
        return 1 / value if self.lower_is_better else value


@dataclass(frozen=True, kw_only=True)
class How:
    """How a task is measured; `measure` says what the options mean."""

    limit: int | None = None
    scoring: Scoring = "both"
    tokens_per_batch: int = 8192
    processes: Processes = Processes()  # noqa: RUF009 - frozen
    show_progress: bool = False


class Task(ABC):
    """Something that a model can do more or less well, and that edits may harm."""

    name: str

    @abstractmethod
    def prepare(self, limit: int | None = None) -> None:
        """Read and check the data, so that nothing of it can fail later.

        Raises:
            RequestError: The data is wrong, or there is none.
            FileNotFoundError: There is no such file.
            ModuleNotFoundError: A package that the scores need is not installed.
        """

    def asked(self, limit: int | None) -> Any:
        """The data that is asked, as JSON can say it, or None where that is not known; ``limit`` as for `prepare`."""
        return None

    def told(self, limit: int | None) -> dict[str, Any] | None:
        """All that the scores depend on besides the model and how it is run; None where that is not known.

        Nor is it of a class from elsewhere, whose rules may change without this package's.
        """
        data = self.asked(limit)
        if data is None or not type(self).__module__.startswith(f"{__package__}."):
            return None
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"task": type(self).__qualname__, "options": own, "data": data}

    @abstractmethod
    def run(self, adapter: Adapter, how: How) -> TaskResult:
        """Measure the model, which is at rest; see `measure`."""


def measure(
    adapter: Adapter,
    task: Task,
    *,
    limit: int | None = None,
    scoring: Scoring = "both",
    precision: Literal["fp32", "bf16"] = "fp32",
    tokens_per_batch: int = 8192,
    processes: Processes = Processes(),  # noqa: B008 - frozen
    show_progress: bool = False,
) -> TaskResult:
    """Measure a model in a task, with its weights as they stand.

    Args:
        adapter: The model and its tokenizer.
        task: The task.
        limit: Ask the first so many records; None for all.
        scoring: The published prompts and rules (paper), correct ones (standard), or both.
        precision: fp32 gives the answers of the plain model one prompt at a time; bf16 runs a copy of the weights in bf16,
            which is faster where the hardware knows bf16, and may answer otherwise where two words are nearly as likely.
        tokens_per_batch: Tokens of a padded batch with what is written after its prompts; more takes more memory.
        processes: The processes that share the records, all with the same model; each gets the result.
        show_progress: Whether to show bars.

    Raises:
        RequestError: As `Task.prepare`.
        ValueError: A prompt does not fit the model's context.
    """
    task.prepare(limit)
    with running_in(adapter, torch.bfloat16) if precision == "bf16" else nullcontext():
        how = How(
            limit=limit,
            scoring=scoring,
            tokens_per_batch=tokens_per_batch,
            processes=processes,
            show_progress=show_progress,
        )
        return task.run(adapter, how)


@contextmanager
def running_in(adapter: Adapter, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the model's parameters are copies in this dtype; afterwards they are the very tensors that they were."""
    kept = [(parameter, parameter.data) for parameter in adapter.model.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class PromptTask(Task):
    """A task of records, each asked by one prompt or several.

    A subclass says what is asked (`prompts`), what the right answer is (`gold`), how an answer is read out of what the model
    writes (`parse`) and what it is worth (`standard`); where something was published, `paper_prompts` and `paper` as well.
    The published rule sees ``paper_tokens`` new tokens, as the published scripts decode them: with the end-of-text token. The
    standard one sees ``new_tokens``, cut at a stop string. Prompts that are the same are run once.

    Args:
        path: A .json, .jsonl or .csv file, or a hub data set, in the schema of the task's own data set; null for that one.
        config: The hub data set's configuration.
        split: The hub data set's split; null for the task's own.
        shots: Show so many solved records before each standard prompt. They are the first ones, which are then not asked.
        max_new_tokens: The longest text for the standard scores, in tokens; null for the task's own.

    Raises:
        ValueError: A number is out of range.
    """

    hub: tuple[str, str | None, str] | None = None
    """The task's own data set: name, configuration and split."""
    columns: Mapping[str, type | tuple[type, ...]] = {}
    """The columns that are needed, and of what type."""
    new_tokens: int = 20
    """New tokens for the standard scores."""
    paper_tokens: int = 0
    """New tokens in the published script; 0 where nothing was published."""
    stop: tuple[str, ...] = ("\n",)
    """What ends an answer; leading white space does not."""
    main: str
    """The standard score that stands for the ability."""

    def __init__(
        self,
        *,
        path: str | None = None,
        config: str | None = None,
        split: str | None = None,
        shots: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        if shots < 0 or (max_new_tokens is not None and max_new_tokens < 1):
            raise ValueError(f"{self.name}: shots must be at least 0 and max_new_tokens at least 1.")
        if path is None and self.hub is None:
            raise ValueError(f"{self.name} has no data set of its own: give it a path.")
        own = self.hub or ("", None, "")
        self.path = own[0] if path is None else path
        self.config = own[1] if path is None and config is None else config
        self.split = own[2] if path is None and split is None else split
        self.shots = shots
        self.max_new_tokens = self.new_tokens if max_new_tokens is None else max_new_tokens
        self._read: list[tuple[str, Record]] = []

    # What a task says --------------------------------------------------------------------------------------------

    @abstractmethod
    def prompts(self, record: Record) -> list[str]:
        """What the model is to continue for the standard scores."""

    @abstractmethod
    def gold(self, record: Record) -> Any:
        """The right answer.

        Raises:
            ValueError: The record has none that makes sense.
        """

    @abstractmethod
    def parse(self, record: Record, texts: Sequence[str]) -> Any:
        """The answer that the model's texts give, None if they give none."""

    @abstractmethod
    def standard(self, record: Record, answer: Any) -> dict[str, Part]:
        """What the answer is worth, by score."""

    @abstractmethod
    def solution(self, record: Record) -> list[str]:
        """What the model should write after each prompt; shown in few-shot prompts."""

    def paper_prompts(self, record: Record) -> list[str]:
        """The published prompts."""
        return self.prompts(record)

    def paper(self, record: Record, texts: Sequence[str]) -> Part:
        """The published score of the texts after the published prompts."""
        raise NotImplementedError

    def options(self, record: Record) -> Sequence[str]:
        """Texts of which the likeliest after the first prompt is an answer too; none by default."""
        return ()

    def by_likelihood(self, record: Record, log_likelihoods: Sequence[float]) -> dict[str, Part]:
        """What the log-likelihoods of the options are worth, in nats, by score."""
        return {}

    # What is done with it ----------------------------------------------------------------------------------------

    def prepare(self, limit: int | None = None) -> None:
        """Read the records, and check those that will be asked."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}; null asks all records.")
        if not self._read:
            self._read = [(where, row) for where, _, row in read_records(self.path, split=self.split, name=self.config)]
        if len(self._read) <= self.shots:
            raise RequestError(f"{len(self._read)} records, all of which are shots; lower shots", where=self.path)
        for where, record in self._read[: None if limit is None else self.shots + limit]:
            self._check(record, where)

    def asked(self, limit: int | None) -> list[Record]:
        """The records, shots first."""
        return [record for _, record in self._read[: None if limit is None else self.shots + limit]]

    @property
    def records(self) -> list[tuple[str, Record]]:
        """The records that can be asked and where each stands, once they are read."""
        return self._read[self.shots :]

    def _check(self, record: Record, where: str) -> None:
        missing = [column for column in self.columns if column not in record]
        if missing:
            raise RequestError(
                f"wrong columns for {self.name}: found {', '.join(record)}; expected {', '.join(self.columns)}",
                where=where,
            )
        for column, kind in self.columns.items():
            if not isinstance(record[column], kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                wanted = " or ".join(k.__name__ for k in kinds)
                raise RequestError(f"must be {wanted}, not {record[column]!r:.40}", field=column, where=where)
        try:
            self.gold(record)
        except ValueError as error:
            raise RequestError(f"no right answer for {self.name}: {error}", where=where) from error

    def run(self, adapter: Adapter, how: How) -> TaskResult:
        """Ask the records and score the answers."""
        paper, standard = how.scoring != "standard" and self.paper_tokens > 0, how.scoring != "paper"
        if not paper and not standard:
            raise ValueError(f"{self.name} has no published score; set scoring to standard or both.")
        shown = [record for _, record in self._read[: self.shots]]
        records = [record for _, record in self.records[: how.limit]]

        def outputs(mine: Sequence[Record]) -> list[Output]:
            return self._outputs(adapter, how, mine, shown, paper=paper, standard=standard)

        found = how.processes.collect(records, outputs)
        names = dict.fromkeys(name for output in found for name in output.parts)
        return TaskResult(
            task=self.name,
            scores={f"{self.name}/{name}": summarise([output.parts[name] for output in found]) for name in names},
            n=len(found),
            unparseable=sum(output.answer is None for output in found) / len(found),
            main=f"{self.name}/{self.main if standard else 'paper'}",
            outputs=tuple(found),
        )

    def _outputs(
        self,
        adapter: Adapter,
        how: How,
        records: Sequence[Record],
        shown: Sequence[Record],
        *,
        paper: bool,
        standard: bool,
    ) -> list[Output]:
        solved = [pair for record in shown for pair in zip(self.prompts(record), self.solution(record), strict=True)]
        before = "".join(f"{prompt} {solution}\n\n" for prompt, solution in solved)
        asked = [[before + prompt for prompt in self.prompts(record)] if standard else [] for record in records]
        published = [self.paper_prompts(record) if paper else [] for record in records]
        options = [[*self.options(record)] if standard else [] for record in records]
        first = _first_tokens(adapter, asked, options)
        written = self._written(adapter, how, [*chain(*asked)], [*chain(*published)], first)
        likely = _likelihoods(adapter, how, asked, options, written, first)
        found = []
        for number, record in enumerate(records):
            parts: dict[str, Part] = {}
            special = [written[p] for p in published[number]]
            if paper:
                cut: dict[str, Any] = {"first": self.paper_tokens, "special": True}
                parts["paper"] = self.paper(record, [continued_text(adapter, c, **cut) for c in special])
            prompts = asked[number] or published[number]
            texts = [continued_text(adapter, written[prompt]) for prompt in prompts]
            answer = self.parse(record, [up_to_stop(text, self.stop) for text in texts])
            if standard:
                by_likelihood = self.by_likelihood(record, likely[number]) if likely[number] else {}
                parts |= by_likelihood | self.standard(record, answer)
            found.append(Output(prompts=tuple(prompts), texts=tuple(texts), answer=answer, parts=parts))
        return found

    def _written(
        self,
        adapter: Adapter,
        how: How,
        asked: Sequence[str],
        published: Sequence[str],
        first: Mapping[str, Sequence[int]],
    ) -> dict[str, Continuation]:
        """What the model writes after each prompt, as far as it will be read, and how likely these first tokens are."""
        longest = dict.fromkeys(asked, (0, self.max_new_tokens))
        for prompt in published:
            longest[prompt] = (self.paper_tokens, max(self.paper_tokens, longest.get(prompt, (0, 0))[1]))
        written: dict[str, Continuation] = {}
        for least, most in dict.fromkeys(longest.values()):
            prompts = [prompt for prompt, lengths in longest.items() if lengths == (least, most)]
            found = continuations(
                adapter,
                prompts,
                max_new_tokens=most,
                finished=stopping(adapter, self.stop, least=least),
                candidates=[first.get(prompt, ()) for prompt in prompts],
                tokens_per_batch=how.tokens_per_batch,
                show_progress=how.show_progress,
            )
            written |= zip(prompts, found, strict=True)
        return written


def _first_tokens(
    adapter: Adapter, asked: Sequence[Sequence[str]], options: Sequence[Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """The options' tokens by prompt, where each option is one token that follows the prompt's own."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for prompt, named in ((a[0], o) for a, o in zip(asked, options, strict=True) if o):
        bare, *rows = encode(adapter.tokenizer, [prompt]) + encode(adapter.tokenizer, [prompt] * len(named), named)
        single = all(row.ids[:-1] == bare.ids for row in rows)
        found.setdefault(prompt, set()).add(tuple(row.ids[-1] for row in rows) if single else ())
    # not where records with one prompt have different options
    return {prompt: next(iter(tokens)) for prompt, tokens in found.items() if len(tokens) == 1 and () not in tokens}


def _likelihoods(
    adapter: Adapter,
    how: How,
    asked: Sequence[Sequence[str]],
    options: Sequence[Sequence[str]],
    written: Mapping[str, Continuation],
    first: Mapping[str, Sequence[int]],
) -> list[list[float]]:
    """The log-likelihoods of each record's options after its first prompt, in nats."""
    pairs = [(a[0], option) for a, named in zip(asked, options, strict=True) for option in named if a[0] not in first]
    prompts, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    scores = iter(score_targets(adapter, prompts, targets, show_progress=how.show_progress) if pairs else [])
    sums = ((score.log_prob * len(score.target)) for score in scores)
    return [
        [*written[a[0]].log_probs] if named and a[0] in first else [next(sums) for _ in named]
        for a, named in zip(asked, options, strict=True)
    ]
