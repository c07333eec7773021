import importlib.util
import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device

import rect_lightning.data as data_package
from rect_lightning.data import EditData, EditRequest, RequestError


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "edits.jsonl"
    records = [{"subject": f"s{i}", "prompt": "{} is", "target_new": f"t{i}", "id": i} for i in range(10)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def ids(*args, **kwargs):
    data = EditData(*args, **kwargs)
    data.setup()
    return [int(request.id) for request in data.requests]


def test_order_is_the_file_s(path):
    assert ids(path) == list(range(10))
    assert ids(path, offset=3, limit=4) == [3, 4, 5, 6]
    assert ids(path, offset=7) == [7, 8, 9]
    assert ids(path, offset=7, limit=3) == [7, 8, 9]


def test_shuffle_comes_before_offset_and_limit(path):
    everything = ids(path, shuffle=True, seed=1)
    assert sorted(everything) == list(range(10))
    assert everything != list(range(10))
    assert ids(path, shuffle=True, seed=1, offset=2, limit=5) == everything[2:7]
    assert ids(path, shuffle=True, seed=2) != everything
    assert ids(path, seed=1) == list(range(10)), "without shuffle the seed does nothing"


def test_shuffle_leaves_the_global_generators_alone(path):
    state = random.getstate(), torch.get_rng_state()
    ids(path, shuffle=True)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("options", [{"limit": 11}, {"offset": 10}, {"offset": 5, "limit": 6}])
def test_asking_for_more_than_there_is(path, options):
    with pytest.raises(ValueError, match="has 10 requests, too few"):
        ids(path, **options)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"eval_batch_size": 0}, {"offset": -1}, {"limit": 0}])
def test_numbers_out_of_range(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be at least"):
        EditData(**option)


def test_nothing_before_setup(path):
    data = EditData(path)
    for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        with pytest.raises(RuntimeError, match="setup"):
            loader()


def test_loaders(path):
    data = EditData(path, batch_size=4, eval_batch_size=6)
    data.setup()
    train = data.train_dataloader()
    assert train.num_workers == 0
    batches = list(train)
    assert [[request.id for request in batch] for batch in batches] == [list("0123"), list("4567"), list("89")]
    assert all(isinstance(batch, list) and isinstance(batch[0], EditRequest) for batch in batches)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert [len(batch) for batch in loader] == [6, 4]
    assert list(data.predict_dataloader())[1] == ["s6 is", "s7 is", "s8 is", "s9 is"]


def test_prompts_as_list_and_as_file(path, tmp_path):
    data = EditData(path, prompts=["a", "b"])
    data.setup()
    assert list(data.predict_dataloader()) == [["a", "b"]]
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two words \n", encoding="utf-8")
    data = EditData(path, prompts=str(file))
    data.setup()
    assert list(data.predict_dataloader()) == [["one", "two words"]]


def test_bad_prompts_are_refused_in_setup(path, tmp_path):
    with pytest.raises(RequestError, match="no prompts"):
        EditData(path, prompts=[]).setup()
    (tmp_path / "prompts.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"did you mean prompts\.txt\?"):
        EditData(path, prompts=str(tmp_path / "prompt.txt")).setup()


def test_bad_data_is_refused_before_anything_else(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"subject": "", "prompt": "{} is", "target_new": "x"}\n')

    class Expensive(Recorder):
        def configure_model(self):
            pytest.fail("the model was loaded")

    with pytest.raises(RequestError, match="line 1: subject"):
        trainer().fit(Expensive(), datamodule=EditData(str(file)))


def test_only_selected_requests_are_compared(tmp_path):
    file = tmp_path / "edits.jsonl"
    records = [{"subject": "s", "prompt": "{} is", "target_new": target} for target in ("a", "b")]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(UserWarning, match="contradictory"):
        EditData(str(file)).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditData(str(file), limit=1).setup()


def test_the_default_is_the_file_that_is_shipped():
    if not Path(data_package.__file__).with_name("facts.jsonl").is_file():
        pytest.skip("facts.jsonl is not there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = EditData(limit=5)
        data.setup()
    assert len(data.requests) == 5
    assert all(request.target_true and request.neighbours for request in data.requests)


@pytest.mark.parametrize("name", ["readers", "records", "formats", "datamodule"])
def test_importing_does_not_import_datasets(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now raises
    file = Path(data_package.__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"fresh_{name}", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- in a Trainer ----


class Recorder(LightningModule):
    """Keeps the batches it is handed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"fit": [], "validate": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["fit"].append(batch)
        return self.weight * len(batch)

    def validation_step(self, batch, batch_idx):
        self.seen["validate"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer():
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_trainer_hands_on_the_very_same_requests(path):
    data, module = EditData(path, batch_size=4, prompts=["p", "q"]), Recorder()
    trainer().fit(module, datamodule=data)
    assert module.weight.item() == -10, "each of the ten requests once"
    assert [[request.id for request in batch] for batch in module.seen["fit"]] == [
        list("0123"),
        list("4567"),
        list("89"),
    ]
    flat = [request for batch in module.seen["fit"] for request in batch]
    assert all(got is wanted for got, wanted in zip(flat, data.requests, strict=True))
    trainer().test(module, datamodule=data, verbose=False)
    assert module.seen["test"] == module.seen["validate"] == [data.requests]
    assert trainer().predict(module, datamodule=data) == [["p", "q"]]


def test_requests_are_left_as_they_are_on_their_way_to_a_device(path):
    data = EditData(path)
    data.setup()
    moved = move_data_to_device(data.requests, torch.device("meta"))
    assert all(got is sent for got, sent in zip(moved, data.requests, strict=True))


def test_ids_that_are_given_twice_are_refused(tmp_path):
    path = tmp_path / "twice.jsonl"
    lines = [{"id": i, "subject": f"S{n}", "prompt": "{} is", "target_new": "x"} for n, i in enumerate("aba")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RequestError, match=r"twice\.jsonl: id: given more than once: a;"):
        EditData(path).setup()
    EditData(path, limit=2).setup()
