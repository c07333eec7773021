"""What all editors share, through a real Trainer on tiny models. The helpers serve the other tests of editors too."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rect_lightning.callbacks import RECT
from rect_lightning.checkpoint_io import EditCheckpointIO
from rect_lightning.data import EditData, EditRequest
from rect_lightning.editors import MEMIT, ROME
from rect_lightning.models import Source
from rect_lightning.solving.corpus import Moments
from rect_lightning.solving.prefixes import Prefixes
from rect_lightning.solving.values import ValueSearch
from tests import tiny
from tests.solving.test_relative_change import naive_mask

# Each subject ends its prompt and each target is one token of the tiny tokenizer: a random model's attention carries
# little from one place to another.
RECORDS = [
    {
        "id": "a", "subject": "Danielle Darrieux", "prompt": "The mother tongue of {}", "target_new": "city",
        "target_true": "French", "paraphrases": ["I think so. The mother tongue of Danielle Darrieux"],
        "neighbours": [{"prompt": "The capital of Spain", "answer": "is"}],
    },
    {"id": "b", "subject": "LeBron James", "prompt": "The sport of {}", "target_new": "French", "target_true": "this"},
    {"id": "c", "subject": "The Eiffel Tower", "prompt": "The city of {}", "target_new": "sport", "target_true": "the"},
    {"id": "d", "subject": "Edwin of Northumbria", "prompt": "The religion of {}", "target_new": "the"},
]  # fmt: skip
PROSE = "\n\n".join(f"Document {i} says that {i * i} is the square of {i}, and {i * 7919 % 1000}." for i in range(60))
SEARCH = ValueSearch(steps=40, lr=0.5, weight_decay=0.0, clamp=100.0, kl=0.0, stop=0.005)
FAMILIES = ("gpt2", "llama")


def opinionated(family, **options):
    """A tiny model whose final norm is scaled, so that its probabilities are not all alike."""
    model = tiny.model(family, **options)
    final = {"gpt2": "transformer.ln_f", "llama": "model.norm"}[family]
    model.get_submodule(final).weight.data *= 4
    return model


def moments(folder, **options):
    """Moments of a short text."""
    path = folder / "text.txt"
    path.write_text(PROSE)
    return Moments(source=str(path), **({"tokens": 1000, "context": 32} | options))


def locate_then_edit(method, folder, family="llama", *, model=None, **options):
    """An editor of a tiny model of 4 layers."""
    options = {
        "search": SEARCH, "moments": moments(folder), "prose": None,
        "prefixes": Prefixes(templates=["{}", "I think so. {}", "You know it. {}"]),
    } | options  # fmt: skip
    editor = method(base=Source(name="tiny"), **options)
    editor.attach(opinionated(family) if model is None else model, tiny.tokenizer())
    return editor


def memit(folder, family="llama", **options):
    """A MEMIT editor of a tiny model, layers 1 and 2 of 4."""
    return locate_then_edit(MEMIT, folder, family, **({"layers": [1, 2], "moments_weight": 0.1} | options))


def rome(folder, family="llama", **options):
    """A ROME editor of a tiny model, layer 1 of 4."""
    return locate_then_edit(ROME, folder, family, **({"layers": [1]} | options))


def facts(folder, **options):
    """The records above as a data module."""
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return EditData(str(path), **options)


def requests():
    """The records above as requests, with what an editor reads."""
    names = ("id", "subject", "prompt", "target_new")
    return [EditRequest(**{name: record[name] for name in names}) for record in RECORDS]


def trainer(*callbacks, **options):
    """A quiet Trainer on the CPU."""
    options = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False,
    } | options  # fmt: skip
    return Trainer(callbacks=list(callbacks), **options)


def fit(editor, data, *callbacks, **options):
    """Fit, and return the Trainer."""
    run = trainer(*callbacks, **options)
    run.fit(editor, datamodule=data)
    return run


def state(editor):
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in editor.network.state_dict().items()}


def identical(a, b):
    """Whether two state dicts agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed_names(before, editor):
    """The names of all tensors of the model that are no longer what they were, bit for bit."""
    after = editor.network.state_dict()
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def edited_names(editor):
    return {f"{editor.model.projection_name(layer)}.weight" for layer in editor.layers}


class Recorder(Callback):
    """Copies each optimizer step's gradients, by layer; stands before or after RECT."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {layer: pl_module.model.weight(layer).grad for layer in pl_module.layers}
        self.steps.append({layer: g.clone() for layer, g in gradients.items() if g is not None})


def record_updates(editor, monkeypatch):
    """The updates that the method computes, as ``(layer, update, requests, state)``, in order."""
    seen = []
    compute = editor.compute_update

    def noting(layer, batch, found):
        update = compute(layer, batch, found)
        seen.append((layer, update.clone(), list(batch), found))
        return update

    monkeypatch.setattr(editor, "compute_update", noting)
    return seen


class Failing:
    """A method whose update fails at a layer of an operation, both counted from 0."""

    def __init__(self, editor, monkeypatch, failure, *, operation=0, layer=1):
        self.compute, self.failure = editor.compute_update, failure
        self.number, self.at = 0, operation * len(editor.layers) + layer
        monkeypatch.setattr(editor, "compute_update", self)

    def __call__(self, layer, batch, found):
        self.number += 1
        if self.number - 1 != self.at:
            return self.compute(layer, batch, found)
        if isinstance(self.failure, BaseException):
            raise self.failure
        update = self.compute(layer, batch, found)
        update[0, 0] = self.failure
        return update


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [memit, rome])
def test_edits_take_and_change_nothing_else(tmp_path, family, make):
    editor = make(tmp_path, family)
    before = state(editor)
    fit(editor, facts(tmp_path, batch_size=2 if make is memit else 1))
    after = state(editor)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == edited_names(editor)
    assert editor.results["before"]["efficacy/exact"] == 0
    assert editor.results["after"]["efficacy/exact"] == 1
    assert editor.done == ["a", "b", "c", "d"]
    assert all(parameter.grad is None for parameter in editor.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_the_surrogate_s_gradient_is_minus_the_update_bit_for_bit(tmp_path, monkeypatch, family, step_per):
    editor = memit(tmp_path, family, step_per=step_per)
    updates, seen = record_updates(editor, monkeypatch), Recorder()
    fit(editor, facts(tmp_path, batch_size=2), seen, RECT(0.4))
    steps = [[u] for u in updates] if step_per == "layer" else [updates[:2], updates[2:]]
    assert len(seen.steps) == len(steps)
    for gradients, step in zip(seen.steps, steps, strict=True):
        assert gradients.keys() == {layer for layer, *_ in step}
        for layer, update, *_ in step:
            assert torch.equal(gradients[layer], -editor.model.oriented(layer, update).float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_change_is_the_sum_of_the_masked_steps(tmp_path, family, step_per, strength):
    editor = memit(tmp_path, family, step_per=step_per, strength=strength)
    raw, masked = Recorder(), Recorder()
    fit(editor, facts(tmp_path, batch_size=2), raw, RECT(0.4), masked)
    assert len(masked.steps) == (4 if step_per == "layer" else 2)
    for layer, clean in editor.clean.items():
        steps = [(r[layer], m[layer]) for r, m in zip(raw.steps, masked.steps, strict=True) if layer in m]
        assert len(steps) == 2
        weight = clean.clone()
        for gradient, left in steps:
            assert torch.equal(left, gradient * naive_mask(gradient, weight, 0.4)), "against the weight as it stands"
            assert (left != 0).sum() == round(0.4 * left.numel())
            weight = weight - strength * left
        assert torch.equal(editor.model.weight(layer), weight)


def test_a_layer_is_computed_from_what_rect_left_of_the_ones_before(tmp_path, monkeypatch):
    editor = memit(tmp_path)
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path), RECT(0.4), limit_train_batches=1, limit_val_batches=0)
    (_, first, batch, found), (_, second, *_) = updates
    clean = editor.clean[1]
    editor.restore()
    editor.model.weight(1).data += first.float() * naive_mask(first.float(), clean, 0.4)
    assert torch.equal(MEMIT.compute_update(editor, 2, batch, found), second)
    editor.restore()
    editor.model.weight(1).data += first.float()
    assert not torch.allclose(MEMIT.compute_update(editor, 2, batch, found), second, rtol=1e-3)


def test_step_per_operation_masks_the_updates_of_the_unmasked_sequence(tmp_path, monkeypatch):
    plain, masked = memit(tmp_path), memit(tmp_path, step_per="operation")
    expected, found = record_updates(plain, monkeypatch), record_updates(masked, monkeypatch)
    once = {"limit_train_batches": 1, "limit_val_batches": 0}
    fit(plain, facts(tmp_path, batch_size=2), **once)
    fit(masked, facts(tmp_path, batch_size=2), RECT(0.4), **once)
    assert len(found) == len(expected) == 2
    for (layer, update, *_), (_, unmasked, *_) in zip(found, expected, strict=True):
        assert torch.equal(update, unmasked)
        clean, update = masked.clean[layer], update.float()
        left = update * naive_mask(update, clean, 0.4)
        torch.testing.assert_close(masked.model.weight(layer) - clean, left, atol=1e-6, rtol=1e-4)
        assert torch.equal(masked.model.weight(layer) != clean, (clean + left) != clean)


def test_all_is_computed_in_eval_mode(tmp_path):
    class Modes(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(any(module.training for module in pl_module.network.modules()))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.on_train_batch_start(trainer, pl_module, None, 0)

    model = opinionated("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    with_dropout, without, modes = memit(tmp_path, model=model), memit(tmp_path, "gpt2"), Modes()
    fit(with_dropout, facts(tmp_path, batch_size=2), modes)
    fit(without, facts(tmp_path, batch_size=2))
    assert modes.seen == [False] * 6
    assert identical(state(with_dropout), state(without))


# Single mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("make", "batch_size"), [(memit, 2), (rome, 1)])
def test_single_starts_from_and_ends_with_the_clean_weights(tmp_path, family, make, batch_size):
    class Watch(Callback):
        def __init__(self):
            self.starts, self.ends = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.starts.append(state(pl_module))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.ends.append(pl_module.is_clean())

    editor = make(tmp_path, family, mode="single")
    before, watch = state(editor), Watch()
    run = fit(editor, facts(tmp_path, batch_size=batch_size), watch)
    assert len(watch.starts) == 4 // batch_size
    assert all(identical(before, start) for start in watch.starts)
    assert not any(watch.ends), "callbacks see each operation's edited weights"
    assert identical(before, state(editor))
    # each request is measured right after its own edit, on the edited model
    assert editor.results["before"]["efficacy/exact"] == 0
    assert editor.results["after"]["efficacy/exact"] == 1
    assert float(run.callback_metrics["after/efficacy/exact"]) == 1
    assert float(run.callback_metrics["before/efficacy/exact"]) == 0


def test_single_makes_the_same_edits_as_fits_of_their_own(tmp_path, monkeypatch):
    """Searching ahead for the operations to come must not show."""
    ahead = rome(tmp_path, mode="single")
    updates = record_updates(ahead, monkeypatch)
    fit(ahead, facts(tmp_path))
    for i in range(4):
        alone = rome(tmp_path)
        fit(alone, facts(tmp_path, offset=i, limit=1), limit_val_batches=0)
        change = alone.model.weight(1) - alone.clean[1]
        torch.testing.assert_close(updates[i][1].float(), change, atol=1e-4, rtol=1e-2)


# All or nothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ValueError("broken"), ValueError),
        (float("nan"), RuntimeError),
        (float("inf"), RuntimeError),
        (KeyboardInterrupt(), (KeyboardInterrupt, SystemExit)),
    ],
)
def test_a_failing_operation_leaves_the_weights_as_before_it(tmp_path, monkeypatch, step_per, failure, error):
    editor = memit(tmp_path, step_per=step_per)
    Failing(editor, monkeypatch, failure, operation=1)
    reference = memit(tmp_path, step_per=step_per)
    fit(reference, facts(tmp_path, batch_size=2, limit=2), RECT(0.4), limit_val_batches=0)
    with pytest.raises(error):
        fit(editor, facts(tmp_path, batch_size=2), RECT(0.4), limit_val_batches=0)
    assert not editor.is_clean()
    assert identical(state(editor), state(reference))
    assert editor.done == ["a", "b"]


def test_an_update_that_is_not_finite_names_layer_and_requests(tmp_path, monkeypatch):
    editor = memit(tmp_path)
    Failing(editor, monkeypatch, float("nan"))
    with pytest.raises(RuntimeError, match=r"layer 2 for the requests a, b is not finite.*as before this operation"):
        fit(editor, facts(tmp_path, batch_size=2))


@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_a_failing_callback_leaves_the_weights_as_before_the_operation(tmp_path, step_per):
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == (1 if step_per == "layer" else 0):
                raise ValueError("broken")

    editor = memit(tmp_path, step_per=step_per)
    before = state(editor)
    with pytest.raises(ValueError, match="broken"):
        fit(editor, facts(tmp_path, batch_size=2), Fails())
    assert identical(before, state(editor))
    assert editor.operations == 0


# What is refused -----------------------------------------------------------------------------------------------------


class Zero(Callback):
    """A regulariser that leaves nothing."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            if weight.grad is not None:
                weight.grad.zero_()


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_refuses_to_pass_off_the_base_model_as_edited(tmp_path, mode):
    editor = memit(tmp_path, mode=mode)
    with pytest.raises(RuntimeError, match=r"no weight differs|changed no weight"):
        fit(editor, facts(tmp_path, batch_size=2), Zero())


def no_moments(*_, **__):
    raise AssertionError("the moments are computed, which is what takes long")


def test_rome_refuses_several_requests_before_anything_is_computed(tmp_path, monkeypatch):
    editor = rome(tmp_path)
    before = state(editor)
    monkeypatch.setattr("rect_lightning.editors.locate_then_edit.second_moments", no_moments)
    with pytest.raises(ValueError, match=r"one request at a time and got 2: set data\.batch_size to 1"):
        fit(editor, facts(tmp_path, batch_size=2))
    assert identical(before, state(editor))


def test_rome_refuses_several_requests_and_changes_nothing(tmp_path):
    editor = rome(tmp_path)
    before = state(editor)
    with pytest.raises(ValueError, match=r"one request at a time and got 2: set data\.batch_size to 1"):
        fit(editor, facts(tmp_path, batch_size=2))
    assert identical(before, state(editor))


@pytest.mark.parametrize("layers", [[1, 4], [-1], [2, 1], [1, 1], []])
def test_refuses_layers_that_the_model_does_not_have(tmp_path, layers):
    with pytest.raises(ValueError, match="layers"):
        memit(tmp_path, layers=layers)


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_refuses_a_strength_that_is_not_positive(tmp_path, strength):
    with pytest.raises(ValueError, match="strength scales the update and must be positive"):
        memit(tmp_path, strength=strength)


def test_refuses_a_prose_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.prose: there is no text file .*nowhere\.txt"):
        memit(tmp_path, prose=str(tmp_path / "nowhere.txt"))


def test_refuses_weights_that_are_not_fp32(tmp_path):
    with pytest.raises(TypeError, match=r"down_proj is in torch\.bfloat16; edited weights have to be torch\.float32"):
        memit(tmp_path, model=opinionated("llama").to(torch.bfloat16))


def test_refuses_bf16_true_before_anything_is_computed(tmp_path, monkeypatch):
    editor = memit(tmp_path)
    monkeypatch.setattr("rect_lightning.editors.locate_then_edit.second_moments", no_moments)
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true .*bf16-mixed"):
        fit(editor, facts(tmp_path), precision="bf16-true")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_refuses_to_measure_in_bf16_true(tmp_path, stage):
    editor = memit(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true"):
        getattr(trainer(precision="bf16-true"), stage)(editor, datamodule=facts(tmp_path), verbose=False)


def test_refuses_a_strategy_that_may_split_weights(tmp_path, monkeypatch):
    editor = memit(tmp_path)
    monkeypatch.setattr(Trainer, "world_size", property(lambda self: 2))
    monkeypatch.setattr("rect_lightning.editors.locate_then_edit.second_moments", no_moments)
    with pytest.raises(
        RuntimeError, match=r"SingleDeviceStrategy may split over its 2 .*strategy to ddp, or trainer\.devices to 1"
    ):
        fit(editor, facts(tmp_path))


def test_clipping_gradients_is_refused_by_lightning(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"gradient clipping.*manual optimization"):
        fit(memit(tmp_path), facts(tmp_path), gradient_clip_val=1.0)


def test_there_is_no_model_before_it_is_loaded():
    editor = ROME(base=Source(name="tiny"), layers=[1], prose=None)
    with pytest.raises(RuntimeError, match="No model is loaded yet"):
        _ = editor.model


# Precision -----------------------------------------------------------------------------------------------------------


def test_mixed_bf16_keeps_the_edited_weights_in_fp32(tmp_path, monkeypatch):
    editor = memit(tmp_path)
    updates, seen = record_updates(editor, monkeypatch), Recorder()
    fit(editor, facts(tmp_path, batch_size=4), seen, precision="bf16-mixed")
    assert {w.dtype for w in editor.network.parameters()} == {torch.float32}
    assert [update.dtype for _, update, *_ in updates] == [torch.float64] * 2
    for step, (layer, update, *_) in zip(seen.steps, updates, strict=True):
        assert torch.equal(step[layer], -update.float())
        change = editor.model.weight(layer) - editor.clean[layer]
        torch.testing.assert_close(change, update.float(), atol=1e-6, rtol=1e-4)
    assert editor.results["after"]["efficacy/exact"] == 1


def test_a_loss_scale_does_not_reach_the_update(tmp_path):
    """Under 16-mixed the loss is scaled and the gradient unscaled again: only one that came from a loss survives that."""
    plain, scaled = memit(tmp_path), memit(tmp_path)
    masked = Recorder()
    fit(plain, facts(tmp_path, batch_size=4), RECT(0.4))
    fit(scaled, facts(tmp_path, batch_size=4), RECT(0.4), masked, plugins=MixedPrecision("16-mixed", "cpu"))
    assert len(masked.steps) == 2
    assert not scaled.is_clean()
    for layer in (1, 2):
        torch.testing.assert_close(scaled.model.weight(layer), plain.model.weight(layer), atol=1e-6, rtol=1e-4)


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path):
    """An editor after a fit, its data and its checkpoint."""
    editor, data = memit(tmp_path), facts(tmp_path, batch_size=2)
    fit(editor, data, RECT(0.4), ModelCheckpoint(dirpath=tmp_path, filename="edited"))
    return editor, data, tmp_path / "edited.ckpt"


def test_a_checkpoint_holds_the_edited_weights_and_plain_values(edited):
    editor, _, path = edited
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"network.{name}" for name in edited_names(editor)}
    told = checkpoint["rect_lightning"]
    assert json.loads(json.dumps(told)) == told
    assert (told["editor"], told["layers"], told["requests"]) == ("MEMIT", [1, 2], ["a", "b", "c", "d"])
    assert (told["operations"], told["mode"], told["step_per"], told["strength"]) == (2, "sequential", "layer", 1.0)
    assert told["templates"] == ["{}", "I think so. {}", "You know it. {}"]
    assert told["fingerprint"] == editor.fingerprint
    assert told["versions"]["torch"] == torch.__version__
    weights = sum(editor.model.weight(layer).numel() for layer in editor.layers)
    assert path.stat().st_size < 4 * weights + 50_000


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_brings_the_edits_back(tmp_path, edited, stage):
    editor, data, path = edited
    fresh = memit(tmp_path)
    run = trainer()
    getattr(run, stage)(fresh, datamodule=data, ckpt_path=path, verbose=False)
    assert identical(state(fresh), state(editor))
    assert fresh.results == editor.results
    assert fresh.results["before"]["efficacy/exact"] == 0
    assert fresh.results["after"]["efficacy/exact"] > 0
    assert run.callback_metrics["after/efficacy/exact"] == pytest.approx(fresh.results["after"]["efficacy/exact"])


def test_a_checkpoint_of_another_base_model_is_refused_by_name(tmp_path, edited):
    _, data, path = edited
    other = memit(tmp_path, model=opinionated("llama", seed=1))
    before = state(other)
    with pytest.raises(ValueError, match=r"edits tiny \(weights \w{12}\); the model loaded is tiny \(weights \w{12}\)"):
        trainer().validate(other, datamodule=data, ckpt_path=path, verbose=False)
    assert identical(before, state(other))


def test_a_checkpoint_of_other_layers_is_refused(tmp_path, edited):
    _, data, path = edited
    other = memit(tmp_path, layers=[0, 1])
    with pytest.raises(ValueError, match=r"edits layers \[1, 2\], the configuration says \[0, 1\]"):
        trainer().validate(other, datamodule=data, ckpt_path=path, verbose=False)
    assert other.is_clean()


def test_a_foreign_checkpoint_is_refused(tmp_path, edited):
    _, data, path = edited
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["rect_lightning"]
    torch.save(checkpoint, path)
    fresh = memit(tmp_path)
    with pytest.raises(ValueError, match="not one of an editor"):
        trainer().validate(fresh, datamodule=data, ckpt_path=path, verbose=False)
    assert fresh.is_clean()


@pytest.mark.parametrize("damage", ["one missing", "all missing"])
def test_a_checkpoint_without_the_edited_weights_is_refused(tmp_path, edited, damage):
    _, data, path = edited
    checkpoint = torch.load(path, weights_only=True)
    names = list(checkpoint["state_dict"])
    for name in names if damage == "all missing" else names[:1]:
        del checkpoint["state_dict"][name]
    EditCheckpointIO().save_checkpoint(checkpoint, path)
    with pytest.raises((ValueError, RuntimeError), match=r"down_proj"):
        trainer().validate(memit(tmp_path), datamodule=data, ckpt_path=path, verbose=False)


def stopped_after(folder, operations, **options):
    """The checkpoint of a fit over all four facts that was stopped after some operations of one fact each."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == operations:
                trainer.save_checkpoint(folder / "stopped.ckpt")
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(memit(folder, **options), facts(folder), RECT(0.4), Stop())
    return folder / "stopped.ckpt"


@pytest.mark.parametrize("operations", [1, 3])
def test_a_resumed_fit_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, operations):
    whole, resumed = memit(tmp_path), memit(tmp_path)
    fit(whole, facts(tmp_path), RECT(0.4))
    path = stopped_after(tmp_path, operations)
    trainer(RECT(0.4)).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert resumed.done == ["a", "b", "c", "d"]
    assert identical(state(resumed), state(whole))
    assert resumed.results == whole.results


def test_a_resumed_fit_uses_the_same_sampled_prefixes(tmp_path):
    options = {"prefixes": Prefixes(count=2, lengths=(3,))}
    path = stopped_after(tmp_path, 1, **options)
    resumed = memit(tmp_path, prefixes=Prefixes(count=2, lengths=(3,), seed=7))
    trainer(RECT(0.4)).fit(resumed, datamodule=facts(tmp_path), ckpt_path=path)
    assert list(resumed.templates) == torch.load(path, weights_only=True)["rect_lightning"]["templates"]


def test_single_mode_leaves_no_checkpoint_of_the_base_model(tmp_path):
    """A file called edited that holds the clean weights would pass for an edit."""
    editor = rome(tmp_path, mode="single")
    fit(editor, facts(tmp_path), ModelCheckpoint(dirpath=tmp_path, filename="edited"))
    path = tmp_path / "edited.ckpt"
    if path.is_file():
        weights = torch.load(path, weights_only=True)["state_dict"]
        name = f"network.{editor.model.projection_name(1)}.weight"
        assert not torch.equal(weights[name], editor.clean[1])


def test_a_second_fit_goes_on_from_the_first(tmp_path):
    twice, once = memit(tmp_path), memit(tmp_path)
    fit(twice, facts(tmp_path, limit=2), limit_val_batches=0)
    fit(twice, facts(tmp_path, offset=2), limit_val_batches=0)
    fit(once, facts(tmp_path), limit_val_batches=0)
    assert identical(state(twice), state(once))
    assert twice.done == once.done
