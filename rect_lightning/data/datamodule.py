"""The data module: which requests are edited, in which order, and how many at a time."""

# No `from __future__ import annotations`: the command line reads the types of the constructor.

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from rect_lightning.data.readers import parse_requests, warn_of_conflicts
from rect_lightning.data.records import missing_file
from rect_lightning.data.request import EditRequest, RequestError


class EditData(LightningDataModule):
    """Edit requests from a file, from the hub, or from the facts that come with this package.

    A training batch is one edit operation. Order and selection are fixed when the requests are read: shuffle, then
    offset, then limit. Validation and test go through the same requests.

    Args:
        path: A .json, .jsonl or .csv file, the name of a data set on the Hugging Face hub such as azhx/counterfact, or
            "facts" for the facts that come with this package.
        format: What the records look like: counterfact, zsre, or plain for your own, with the columns subject, prompt
            and target_new and optionally target_true, paraphrases, neighbours, generation_prompts, relation and id.
            auto tells by the columns.
        split: Which split of a hub data set to read, such as train or train[:100]; needed where there are several. Not
            for files.
        zsre_target: What zsRE is edited towards: alt, a wrong answer (as in the RECT paper), or answer, the right one
            (as in ROME and MEMIT).
        batch_size: How many requests are edited together, in one edit operation, whatever the number of processes.
        limit: Edit so many requests, of which there must be as many; null for all.
        offset: Leave out so many requests before the first one that is edited.
        shuffle: Put the requests in a random order, before offset and limit.
        seed: Decides the order if shuffle is true: the same seed, the same order.
        prompts: What predict continues: a list of prompts, or the path of a text file with one prompt a line; null for
            the requests' own prompts.
        eval_batch_size: How many requests, or prompts, come in one batch of validation, test and predict. Has no
            influence on the results.
        held_out: Keep the last so many of the selected requests out of training and validate with them alone, where a
            hypernetwork is trained. Editors measure what they edited, and want 0.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        path: str = "facts",
        *,
        format: Literal["auto", "counterfact", "zsre", "plain"] = "auto",
        split: str | None = None,
        zsre_target: Literal["alt", "answer"] = "alt",
        batch_size: int = 1,
        limit: int | None = None,
        offset: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        prompts: list[str] | str | None = None,
        eval_batch_size: int = 64,
        held_out: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("offset", offset, 0),
            ("held_out", held_out, 0),
            ("limit", limit, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.path = path
        self.format = format
        self.split = split
        self.zsre_target = zsre_target
        self.batch_size = batch_size
        self.limit = limit
        self.offset = offset
        self.shuffle = shuffle
        self.seed = seed
        self.prompts = prompts
        self.eval_batch_size = eval_batch_size
        self.held_out = held_out
        self._requests: list[EditRequest] = []
        self._prompts: list[str] = []
        self._all: list[EditRequest] = []  # what one process has read ahead of `setup`

    @property
    def requests(self) -> list[EditRequest]:
        """The selected requests, in the order in which they are edited.

        Raises:
            RuntimeError: If `setup` has not run yet.
        """
        if not self._requests:
            raise RuntimeError("the requests are not read yet; call setup() first")
        return self._requests

    def prepare_data(self) -> None:
        """Read the data once, in one process: this fills the hub's cache and refuses bad data first of all."""
        if self.prompts is None or not getattr(self.trainer, "predicting", False):
            self._all = self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read and select the requests, in every process.

        Args:
            stage: All see the same requests; predict reads none if it has prompts.

        Raises:
            RequestError: If anything in the data is wrong.
            FileNotFoundError: If a file is not there.
            ValueError: If offset and limit ask for more requests than there are.
        """
        if stage == "predict" and self.prompts is not None:
            self._prompts = self._read_prompts()
            return
        if self._requests:
            return
        selected, self._all = self._select(self._all or self._read()), []
        if self.held_out >= len(selected):
            raise ValueError(
                f"held_out is {self.held_out} of {len(selected)} requests, which leaves none to train on; lower it"
            )
        _check_ids(selected, str(self.path))
        warn_of_conflicts(selected)
        self._prompts = self._read_prompts()
        self._requests = selected

    def train_dataloader(self) -> DataLoader:
        """Batches of requests, each one edit operation; the last may be smaller.

        Several processes are handed the same batches, whose work they share.
        """
        return _batches(self.requests[: len(self.requests) - self.held_out], self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Batches of the same requests, or of those that are held out."""
        # -0 is the first
        return _batches(self.requests[-self.held_out :], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """Batches of the same requests."""
        return _batches(self.requests, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """Batches of prompts."""
        return _batches(self._prompts or [request.text for request in self.requests], self.eval_batch_size)

    def _read(self) -> list[EditRequest]:
        path = Path(__file__).with_name("facts.jsonl") if self.path == "facts" else self.path
        return parse_requests(path, format=self.format, split=self.split, zsre_target=self.zsre_target)

    def _select(self, requests: list[EditRequest]) -> list[EditRequest]:
        count = len(requests)
        if self.shuffle:
            requests = random.Random(self.seed).sample(requests, count)
        if self.offset + (self.limit or 1) > count:
            wanted = f"offset {self.offset}" + (f" and limit {self.limit}" if self.limit else "")
            raise ValueError(
                f"{self.path} has {count} requests, too few for {wanted}; lower them, or take all there are by "
                "--data.offset 0 --data.limit null"
            )
        return requests[self.offset :][: self.limit]

    def _read_prompts(self) -> list[str]:
        if self.prompts is None:
            return []
        if isinstance(self.prompts, str):
            file = Path(self.prompts).expanduser()
            if not file.is_file():
                raise missing_file(file)
            prompts = file.read_text("utf-8-sig").split("\n")
        else:
            prompts = self.prompts
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
        if not prompts:
            raise RequestError("no prompts; give at least one, or null for the requests' own", where="prompts")
        return prompts


def _check_ids(requests: list[EditRequest], where: str) -> None:
    twice = [id for id, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        names = ", ".join(twice[:5])
        raise RequestError(
            f"given more than once: {names}; requests are told apart by their ids: give each its own, or none at all",
            field="id",
            where=where,
        )


class _Batches(DataLoader):
    """Batches in order, which a resumed run takes up where its checkpoint was saved: Lightning asks for the state."""

    _handed_out = 0
    _skip = 0

    def __iter__(self) -> Iterator[list]:  # type: ignore[override]
        self._handed_out, self._skip = self._skip % len(self), 0
        for batch in islice(super().__iter__(), self._handed_out, None):
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["handed_out"]


def _batches(items: list, size: int) -> DataLoader:
    # all items in order; Lightning leaves a sampler of this class alone, any other it would shuffle and deal out
    sampler: DistributedSampler = DistributedSampler(items, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
    return _Batches(items, batch_size=size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
