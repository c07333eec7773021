"""MEND on a tiny model: the hypernetwork's training, its edits, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rect_lightning.callbacks import RECT
from rect_lightning.checkpoint_io import read_checkpoint
from rect_lightning.data import EditData
from rect_lightning.editors import MEND, MENDTraining
from rect_lightning.models import Source
from rect_lightning.models.encoding import encode
from rect_lightning.reuse import export
from rect_lightning.solving.hypernetwork import Hypernetwork
from rect_lightning.solving.token_gradients import token_gradients
from rect_lightning.solving.upper import run_lower
from tests import tiny
from tests.editors import test_base
from tests.editors.test_base import (
    FAMILIES,
    Recorder,
    changed_names,
    edited_names,
    fit,
    identical,
    memit,
    opinionated,
    state,
    trainer,
)
from tests.solving.test_relative_change import naive_mask

LAYERS = [2, 3]
SUBJECTS = (
    "Danielle Darrieux",
    "LeBron James",
    "Edwin of Northumbria",
    "Madrid",
    "Paris",
    "Spain",
    "France",
    "the Tower",
)
RELATIONS = ("mother tongue", "sport", "religion", "capital", "city")
WORDS = ("city", "French", "sport", "the", "this", "is", "so", "fact", "capital", "religion", "of", "in", "know")


def records():
    """Forty requests, each with a paraphrase and a neighbour."""
    found = []
    for i, subject in enumerate(SUBJECTS):
        for j, relation in enumerate(RELATIONS):
            other = SUBJECTS[(i + 3) % len(SUBJECTS)]
            found.append(
                {
                    "subject": subject,
                    "prompt": f"The {relation} of {{}}",
                    "target_new": WORDS[(5 * i + 3 * j) % len(WORDS)] + (" of France" if j == 1 else ""),
                    "paraphrases": [f"I think so. The {relation} of {subject}"],
                    "neighbours": [{"prompt": f"Because of {other}, the {RELATIONS[j - 2]}", "answer": "is it"}],
                }
            )
    return found


def data(folder, **options):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    return EditData(str(path), **({"shuffle": True, "batch_size": 8} | options))


def training(family="llama", *, model=None, **options):
    torch.manual_seed(0)
    module = MENDTraining(
        base=Source(name="tiny"),
        **({"layers": LAYERS, "rank": 16, "lr": 1e-2, "edit_lr": 1e-2, "edit_weight": 0.3} | options),
    )
    module.attach(opinionated(family) if model is None else model, tiny.tokenizer())
    return module


def mend(checkpoint, family="llama", *, model=None, **options):
    editor = MEND(base=Source(name="tiny"), checkpoint=str(checkpoint), **({"layers": LAYERS, "prose": None} | options))
    editor.attach(opinionated(family) if model is None else model, tiny.tokenizer())
    return editor


def train(folder, module, *callbacks, **options):
    options = {"max_epochs": 12, "default_root_dir": folder, "enable_checkpointing": True} | options
    run = trainer(*callbacks, **options)
    run.fit(module, datamodule=data(folder, held_out=8))
    return run


def test_a_plain_trainer_may_check_validation_first(tmp_path):
    train(tmp_path, training(), max_epochs=1, num_sanity_val_steps=2)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_training_is_in_fp32(tmp_path, precision):
    with pytest.raises(ValueError, match=precision):
        train(tmp_path, training(), precision=precision)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """A hypernetwork trained on 32 of the requests, with what it logged before and after."""
    folder, module = tmp_path_factory.mktemp("mend"), training(request.param)
    before = state(module)
    losses = []

    class Losses(Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append({name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")})

    epochs = {"llama": 25, "gpt2": 2}[request.param]  # one is enough to see what training comes to
    run = train(folder, module, Losses(), EarlyStopping("val/loss", patience=3), max_epochs=epochs)
    assert identical(before, state(module)), "the model itself is not trained"
    return folder, run.checkpoint_callback.best_model_path, request.param, losses


def test_training_reduces_the_loss_on_requests_it_has_not_seen(trained):
    _, best, family, losses = trained
    assert best.endswith("best.ckpt")
    assert [loss["val/loss"] for loss in losses] == pytest.approx(
        [0.3 * x["val/edit_loss"] + x["val/locality_loss"] for x in losses]
    )
    lowest = min(losses, key=lambda x: x["val/loss"])
    assert lowest["val/loss"] < (0.6 if family == "llama" else 1) * losses[0]["val/loss"]
    if family == "llama":
        assert lowest["val/locality_loss"] < 0.3, "the edits leave other texts' next tokens nearly alone"


@pytest.mark.parametrize("trained", ["llama"], indirect=True)  # the other is trained for two epochs only
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_edits_of_unseen_requests_hold(trained, mode):
    folder, best, family, _ = trained
    editor = mend(best, family, mode=mode)
    unseen = {"offset": 32, "limit": 8} if mode == "single" else {"offset": 32, "limit": 1}
    fit(editor, data(folder, batch_size=1, **unseen))
    after, before = editor.results["after"], editor.results["before"]
    assert before["efficacy/token"] <= 0.3
    assert after["efficacy/token"] >= 0.7
    assert after["generalisation/token"] > before["generalisation/token"]
    assert editor.is_clean() == (mode == "single")


def test_no_other_weight_changes(trained):
    folder, best, family, _ = trained
    editor = mend(best, family)
    before = state(editor)
    fit(editor, data(folder, limit=4, batch_size=2), RECT(0.4), limit_val_batches=0)
    assert changed_names(before, editor) == edited_names(editor)


def test_the_update_is_the_sum_over_tokens_of_all_requests(trained, monkeypatch):
    folder, best, family, _ = trained
    editor, seen = mend(best, family), Recorder()
    fit(editor, data(folder, limit=3, batch_size=3), seen, limit_val_batches=0)
    editor.restore()
    model, hypernetwork = editor.model, editor.hypernetwork.double()
    requests = data(folder, limit=3)
    requests.setup()
    expected = dict.fromkeys(LAYERS, 0)
    for request in requests.requests:  # one at a time
        rows = encode(model.tokenizer, [request.text], [request.target_new])
        (gradients,) = token_gradients(model, run_lower(model, [rows[0].ids], LAYERS[0]), rows, LAYERS)
        for layer in LAYERS:
            for u, delta in zip(gradients.u[layer].double(), gradients.delta[layer].double(), strict=True):
                u, delta = hypernetwork(layer, u[None], delta[None])
                expected[layer] = expected[layer] + torch.outer(delta[0], u[0])
    found = {layer: -gradient for step in seen.steps for layer, gradient in step.items()}
    for layer in LAYERS:
        wanted = model.oriented(layer, expected[layer])
        assert float((found[layer] - wanted).norm() / wanted.norm()) < 1e-4


def test_rect_masks_the_update(trained):
    folder, best, family, _ = trained
    editor, raw = mend(best, family), Recorder()
    fit(editor, data(folder, limit=2, batch_size=2), raw, RECT(0.4), limit_val_batches=0)
    for step in raw.steps:
        for layer, gradient in step.items():
            left = gradient * naive_mask(gradient, editor.clean[layer], 0.4)
            torch.testing.assert_close(editor.model.weight(layer).detach(), editor.clean[layer] - left)


def test_training_edits_as_the_editor_does(trained):
    """The edits that are trained through, request by request and together, are those of the editor."""
    folder, best, family, _ = trained
    for edits in (1, 4):
        module = training(family, edits=edits, layers=LAYERS)
        weights = read_checkpoint(best)["state_dict"]
        module.load_state_dict(weights, strict=False)
        module.eval()
        loader = uneven(folder)
        loader.setup()
        requests = loader.requests
        assert [(len(r.paraphrases), len(r.neighbours)) for r in requests] == [(1, 1), (3, 0), (0, 2), (2, 1)]
        edit, locality = module.losses(requests)
        expected = []
        for i in range(0, 4, edits):
            editor = mend(best, family)
            fit(editor, uneven(folder, offset=i, limit=edits, batch_size=edits), limit_val_batches=0)
            for request in requests[i : i + edits]:
                prompts = [request.text, *request.paraphrases]
                nll = [naive_nll(editor.network, editor.model.tokenizer, p, request.target_new) for p in prompts]
                kl = [naive_kl(editor, f"{neighbour.prompt} {neighbour.answer}") for neighbour in request.neighbours]
                expected.append((sum(nll) / len(nll), sum(kl) / max(1, len(kl))))
        wanted = torch.tensor(expected).mean(0)
        torch.testing.assert_close(torch.stack([edit, locality]).detach(), wanted, atol=1e-5, rtol=1e-3)


def uneven(folder, **options):
    """Four of the requests, with other numbers of paraphrases and neighbours."""
    others = [neighbour for record in records()[4:] for neighbour in record["neighbours"]]
    told = ["Because of that, the city of", "I know that", "You know it. The fact is"]
    changed = []
    for record, (paraphrases, neighbours) in zip(records(), [(1, 1), (3, 0), (0, 2), (2, 1)], strict=False):
        texts = [f"{text} {record['subject']}" for text in told[:paraphrases]]
        changed.append(record | {"paraphrases": texts, "neighbours": [others.pop() for _ in range(neighbours)]})
    path = folder / "uneven.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in changed))
    return EditData(str(path), **options)


def test_each_kind_of_parameter_has_its_own_learning_rate():
    module = training(lr=1e-3, lr_lr=5e-2)
    networks, rates = module.configure_optimizers().param_groups
    assert (networks["lr"], rates["lr"]) == (1e-3, 5e-2)
    assert {id(p) for p in networks["params"]} == {id(p) for p in module.hypernetwork.networks.parameters()}
    assert [id(p) for p in rates["params"]] == [id(module.hypernetwork.log_lr)]


def naive_nll(model, tokenizer, prompt, target):
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {target}")["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(torch.stack([log_probs[j - 1, ids[j]] for j in range(start, len(ids))]).mean())


def naive_kl(editor, text):
    ids = torch.tensor([editor.model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        after = editor.network(ids).logits[0].softmax(-1)
        with editor.clean_weights():
            before = editor.network(ids).logits[0].softmax(-1)
    return float((before * (before / after).log()).sum(-1).mean())


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [3, 4, 6])
def test_resumed_training_ends_as_an_uninterrupted_one(tmp_path, caplog, batches):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == batches:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    whole, resumed = training(), training()
    train(tmp_path, whole, max_epochs=2)
    caplog.clear()
    with pytest.raises((KeyboardInterrupt, SystemExit)), caplog.at_level("INFO"):
        train(tmp_path, training(), Stop(), max_epochs=2)
    assert ("lowest validation loss" in caplog.text) == (batches > 4), "there is one after the first epoch"
    run = trainer(max_epochs=2, default_root_dir=tmp_path)
    run.fit(resumed, datamodule=data(tmp_path, held_out=8), ckpt_path=tmp_path / "stopped.ckpt")
    assert run.global_step == 8
    assert identical(resumed.hypernetwork.state_dict(), whole.hypernetwork.state_dict())


@pytest.mark.parametrize("kept", [True, False])
def test_resumed_training_knows_the_best_one_of_before(tmp_path, caplog, kept):
    """Which stays where it is while nothing is better, and without it there is another."""
    first = train(tmp_path, training(), max_epochs=3, default_root_dir=tmp_path / "first")
    before, resumed = first.checkpoint_callback, training()
    run = trainer(max_epochs=5, default_root_dir=tmp_path / "second", enable_checkpointing=True)
    last = tmp_path / "last.ckpt"
    first.save_checkpoint(last)
    if not kept:
        Path(before.best_model_path).unlink()
    resumed.edit_weight = 1e6  # so that every loss to come is larger
    with caplog.at_level("INFO"):
        run.fit(resumed, datamodule=data(tmp_path, held_out=8), ckpt_path=last)
    best = run.checkpoint_callback.best_model_path
    assert re.search(rf"lowest validation loss, [\d.e+]+, is in {re.escape(best)}", caplog.text)
    assert Path(best).is_file()
    assert (best == before.best_model_path) == kept
    assert (run.checkpoint_callback.best_model_score == before.best_model_score) == kept


def test_training_goes_on_with_the_same_requests_and_tells_of_other_options(tmp_path):
    train(tmp_path, training(), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")

    def go_on(module, **options):
        run = trainer(max_epochs=2, default_root_dir=tmp_path)
        run.fit(module, datamodule=data(tmp_path, **{"held_out": 8} | options), ckpt_path=tmp_path / "first.ckpt")

    for options in ({"held_out": 7}, {"shuffle": False}, {"offset": 1, "held_out": 7}):
        module = training()
        with pytest.raises(ValueError, match="trained on 32 requests, and the data as configured have"):
            go_on(module, **options)
    with pytest.warns(UserWarning, match=r"not that of the checkpoint: batch_size, lr\..* Adam goes on as they were"):
        go_on(training(lr=1e-7), batch_size=4)


def test_resumed_edits_end_with_the_weights_of_an_uninterrupted_fit(trained, tmp_path):
    folder, best, family, _ = trained

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    whole, resumed = mend(best, family), mend(best, family)
    fit(whole, data(folder, limit=4, batch_size=1), limit_val_batches=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(mend(best, family), data(folder, limit=4, batch_size=1), Stop())
    run = trainer(limit_val_batches=0)
    run.fit(resumed, datamodule=data(folder, limit=4, batch_size=1), ckpt_path=tmp_path / "stopped.ckpt")
    assert identical(state(resumed), state(whole))


def test_a_checkpoint_holds_the_hypernetwork_alone(trained):
    _, best, family, _ = trained
    checkpoint = read_checkpoint(best)
    told = checkpoint["rect_lightning"]
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"hypernetwork"}
    assert told["layers"] == LAYERS
    assert list(told["hypernetwork"]["weights"].values()) == [[32, {"gpt2": 128, "llama": 96}[family]]] * 2
    assert told["config"]["lr"] == 1e-2


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_hypernetwork_of_other_layers_weights_or_another_model_is_refused(trained, monkeypatch):
    folder, best, family, _ = trained
    for editor, message in (
        (mend(best, family, layers=[1, 3]), r"for the layers \[2, 3\], the configuration says \[1, 3\]"),
        (mend(best, family, model=opinionated(family, seed=1)), "was trained on tiny .* the model loaded is tiny"),
        (mend(best, family, model=opinionated(family, width=48)), r"other shapes: .*\[32, .*there and \[48, .*here"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(editor, data(folder, limit=2))
        assert editor.is_clean()
        assert not editor.operations


def test_a_checkpoint_of_edits_is_no_hypernetwork_and_the_other_way_round(trained, tmp_path):
    folder, best, family, _ = trained
    edited = memit(tmp_path, family, layers=LAYERS)
    run = fit(
        edited,
        test_base.facts(tmp_path, batch_size=4),
        ModelCheckpoint(tmp_path, filename="edited"),
        limit_val_batches=0,
    )
    run.save_checkpoint(tmp_path / "edited.ckpt")
    with pytest.raises(ValueError, match="holds edited weights and no hypernetwork"):
        fit(mend(tmp_path / "edited.ckpt", family), data(folder))
    with pytest.raises(ValueError, match="not one of a hypernetwork's training"):
        trainer().fit(training(family), datamodule=data(folder, held_out=8), ckpt_path=tmp_path / "edited.ckpt")
    with pytest.raises(ValueError, match="not one of an editor"):
        trainer().fit(mend(best, family), datamodule=data(folder), ckpt_path=best)
    with pytest.raises(ValueError, match="holds a hypernetwork, which makes edits"):
        export(Path(best), tmp_path / "exported")


def test_training_of_another_rank_or_model_does_not_go_on(trained):
    folder, best, family, _ = trained
    for module in (
        training(family, rank=8),
        training(family, layers=[1, 3]),
        training(family, model=opinionated(family, seed=1)),
    ):
        with pytest.raises(ValueError, match=r"hypernetwork of rank 16 for the layers \[2, 3\] of tiny"):
            trainer().fit(module, datamodule=data(folder, held_out=8), ckpt_path=best)


def test_going_on_with_another_hypernetwork_is_refused(trained, tmp_path):
    folder, best, family, _ = trained
    run = fit(mend(best, family), data(folder, limit=2), limit_val_batches=0)
    run.save_checkpoint(tmp_path / "edited.ckpt")
    other = train(tmp_path, training(family), max_epochs=1).checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="used another hypernetwork"):
        trainer().fit(mend(other, family), datamodule=data(folder, limit=2), ckpt_path=tmp_path / "edited.ckpt")


def test_what_training_needs_is_told_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match=r"set data\.held_out"):
        fit(training(), data(tmp_path))
    path = tmp_path / "bare.jsonl"
    bare = [{name: x for name, x in record.items() if name != "neighbours"} for record in records()]
    path.write_text("".join(json.dumps(record) + "\n" for record in bare))
    with pytest.raises(ValueError, match="No request has neighbours"):
        fit(training(), EditData(str(path), held_out=2))
    with pytest.raises(ValueError, match="held_out is 40 of 40 requests"):
        fit(training(), data(tmp_path, held_out=40))
    with pytest.raises(ValueError, match=r"data\.batch_size=6 must be a multiple of model\.edits=4"):
        fit(training(edits=4), data(tmp_path, held_out=8, batch_size=6))
    with pytest.raises(ValueError, match=r"data\.held_out is for training a hypernetwork"):
        fit(memit(tmp_path), data(tmp_path, held_out=2))


@pytest.mark.parametrize("option", ["rank", "edits", "edit_weight", "lr", "edit_lr", "lr_lr"])
def test_refuses_numbers_out_of_range(option):
    with pytest.raises(ValueError, match=f"{option} must be positive"):
        MENDTraining(base=Source(name="tiny"), layers=[1], **{option: 0})


def test_an_untrained_editor_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*best\.ckpt"):
        fit(mend(tmp_path / "best.ckpt"), data(tmp_path))
    assert Hypernetwork({1: (2, 3)}, rank=1, edit_lr=1.0).layers == [1]
