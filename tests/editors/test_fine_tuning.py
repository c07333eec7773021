"""Fine-tuning against torch's own Adam on the plain Hugging Face model in float64, one text at a time."""

import copy
import json
from functools import partial, reduce

import pytest
import torch
from lightning.pytorch import Callback

from rect_lightning.callbacks import RECT
from rect_lightning.callbacks.summary import title
from rect_lightning.data import EditData
from rect_lightning.editors import FineTuning
from rect_lightning.models import Source
from tests import tiny
from tests.editors.test_base import FAMILIES, RECORDS, Recorder, fit, identical, memit, opinionated, state, trainer
from tests.solving.test_relative_change import naive_mask

# targets of several tokens and prompts of several lengths
TARGETS = ("the city of Paris", "Madrid", "so. I know", "LeBron")
LONG = [record | {"target_new": target} for record, target in zip(RECORDS, TARGETS, strict=True)]
LOSSES = ("target", "last", "all")


def facts(folder, records=tuple(LONG), **options):
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return EditData(str(path), **options)


def fine_tuning(family="llama", *, bos=False, **options):
    editor = FineTuning(
        base=Source(name="tiny"), **({"layers": [1, 2], "prose": None, "steps": 10, "lr": 1e-2} | options)
    )
    editor.attach(opinionated(family), tiny.tokenizer(bos))
    return editor


def naive_loss(model, tokenizer, loss):
    """The mean over requests of the loss, from whole forward passes over one unpadded text each."""
    total = 0
    for record in LONG:
        prompt = tokenizer(record["prompt"].replace("{}", record["subject"]))["input_ids"]
        target = tokenizer(" " + record["target_new"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + target])
        log_probs = model(ids).logits[0].log_softmax(-1)
        if loss == "last":
            picked = [log_probs[len(prompt) - 1, token] for token in target]
        else:
            start = 1 if loss == "all" else len(prompt)
            picked = [log_probs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]
        total = total - sum(picked) / len(picked) / len(LONG)
    return total


def naive_training(editor, loss, box=None):
    """The changes, in the weights' own orientation, that torch's Adam makes to the model in float64, and the losses."""
    model = copy.deepcopy(editor.network).double()
    names = {layer: f"{editor.model.projection_name(layer)}.weight" for layer in editor.layers}
    before = {layer: model.get_parameter(name).detach() for layer, name in names.items()}
    factors = {layer: naive_factors(editor, layer, weight) for layer, weight in before.items()}
    trained = [factor for layer in editor.layers for factor in factors[layer]]
    adam, losses = torch.optim.Adam(trained, lr=editor.lr), []

    def made():
        return {layer: editor.model.oriented(layer, reduce(torch.matmul, f)) for layer, f in factors.items()}

    for _ in range(editor.steps):
        weights = {names[layer]: before[layer] + change for layer, change in made().items()}
        value = naive_loss(partial(torch.func.functional_call, model, weights), editor.model.tokenizer, loss)
        losses.append(float(value))
        if value < editor.stop:
            break
        adam.zero_grad()
        value.backward()
        adam.step()
        if box is not None:
            for factor in trained:
                factor.data.clamp_(-box, box)
    return [change.detach().float() for change in made().values()], losses


def naive_factors(editor, layer, weight):
    """Zeros ``[out, in]``; or zeros ``[out, rank]`` and Gaussian numbers ``[rank, in]``, as LoRA begins."""
    out, width = editor.model.oriented(layer, weight).shape
    if editor.rank is None:
        return [torch.zeros(out, width, dtype=torch.float64, requires_grad=True)]
    a = torch.randn(editor.rank, width, generator=torch.Generator().manual_seed(layer)) / width**0.5
    return [torch.zeros(out, editor.rank, dtype=torch.float64, requires_grad=True), a.double().requires_grad_()]


def changes(editor):
    return [editor.model.weight(layer).detach() - editor.clean[layer] for layer in editor.layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layers", [[2], [0, 2, 3]])
def test_training_is_that_of_torch_s_adam_on_the_plain_model(tmp_path, family, loss, layers):
    editor = fine_tuning(family, bos=True, loss=loss, layers=layers)
    expected, losses = naive_training(editor, loss)
    run = fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    assert float(run.callback_metrics["edit/loss"]) == pytest.approx(losses[-1], rel=1e-3)
    assert losses[-1] < losses[0]
    for found, wanted in zip(changes(editor), expected, strict=True):
        # Adam blows entries up whose gradient is nothing but rounding, so the whole is compared
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 4])
def test_of_a_low_rank_both_factors_are_trained(tmp_path, family, rank):
    editor = fine_tuning(family, rank=rank, lr=5e-2)
    expected, losses = naive_training(editor, "target")
    run = fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    assert float(run.callback_metrics["edit/loss"]) == pytest.approx(losses[-1], rel=1e-3)
    for found, wanted in zip(changes(editor), expected, strict=True):
        assert int(torch.linalg.matrix_rank(found, rtol=1e-3)) == rank
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "phi3", "gpt_neox", "gptj"])
def test_other_families(tmp_path, family):
    editor = FineTuning(base=Source(name="tiny"), layers=[0, 2], prose=None, steps=3, lr=1e-2)
    editor.attach(tiny.model(family), tiny.tokenizer())
    expected, _ = naive_training(editor, "target")
    fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    for found, wanted in zip(changes(editor), expected, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_the_losses_differ(tmp_path):
    model = opinionated("llama")
    assert len({round(float(naive_loss(model, tiny.tokenizer(), loss)), 4) for loss in LOSSES}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_box_is_around_the_weights_before_each_operation(tmp_path, family):
    box = 2e-3
    editor, seen = fine_tuning(family, loss="last", norm_box=box), Recorder()
    expected, _ = naive_training(fine_tuning(family, loss="last"), "last", box)
    fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    for found, wanted in zip(changes(editor), expected, strict=True):
        assert found.abs().max() == pytest.approx(box, rel=1e-3)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2

    several = fine_tuning(family, loss="last", norm_box=box)
    fit(several, facts(tmp_path, batch_size=1), seen, limit_val_batches=0)
    assert all(float(gradient.abs().max()) <= box * 1.0001 for step in seen.steps for gradient in step.values())
    assert max(float(change.abs().max()) for change in changes(several)) > 1.5 * box, "operations add up"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_rect_masks_the_trained_update(tmp_path, family, step_per):
    plain, masked, raw = fine_tuning(family), fine_tuning(family, step_per=step_per), Recorder()
    fit(plain, facts(tmp_path, batch_size=4), limit_val_batches=0)
    fit(masked, facts(tmp_path, batch_size=4), raw, RECT(0.4), limit_val_batches=0)
    assert len(raw.steps) == (2 if step_per == "layer" else 1)
    gradients = {layer: gradient for step in raw.steps for layer, gradient in step.items()}
    for layer, clean in plain.clean.items():
        left = gradients[layer] * naive_mask(gradients[layer], clean, 0.4)
        torch.testing.assert_close(plain.model.weight(layer).detach(), clean - gradients[layer])
        torch.testing.assert_close(masked.model.weight(layer).detach(), clean - left)


@pytest.mark.parametrize("mode", ["sequential", "single"])
@pytest.mark.parametrize("options", [{}, {"rank": 8, "lr": 0.05}], ids=["whole", "rank"])
def test_edits_take(tmp_path, mode, options):
    editor = fine_tuning(mode=mode, steps=80, stop=1e-3, **options)
    fit(editor, facts(tmp_path, batch_size=1 if mode == "single" else 4))
    assert editor.results["before"]["efficacy/exact"] == 0
    assert editor.results["after"]["efficacy/exact"] == 1
    assert editor.is_clean() == (mode == "single")


def test_training_stops_below_the_bound(tmp_path):
    editor = fine_tuning(stop=100.0)
    with pytest.raises(RuntimeError, match="no weight differs"):
        fit(editor, facts(tmp_path), limit_val_batches=0)
    editor = fine_tuning(steps=200, stop=0.5)
    run = fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    assert 0.2 < float(run.callback_metrics["edit/loss"]) < 0.5


def test_a_resumed_fit_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = fine_tuning()
    fit(whole, facts(tmp_path), limit_val_batches=0)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(fine_tuning(), facts(tmp_path), Stop())
    resumed = fine_tuning()
    trainer(limit_val_batches=0).fit(resumed, datamodule=facts(tmp_path), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.done == whole.done
    assert identical(state(resumed), state(whole))


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    nll = "rect_lightning.editors.fine_tuning.negative_log_likelihood"
    monkeypatch.setattr(nll, lambda model, states, places: states.sum((1, 2)) * torch.nan)
    editor = fine_tuning()
    before = state(editor)
    with pytest.raises(ValueError, match=r"loss of fine-tuning is (nan|inf)"):
        fit(editor, facts(tmp_path, batch_size=4))
    assert identical(state(editor), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"rank": 0}, "rank must be positive"),
        ({"norm_box": 0.0}, "norm_box must be positive"),
        ({"norm_box": 1e-3, "rank": 2}, "give one"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(base=Source(name="tiny"), layers=[1], **options)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"loss": "last"}, "FT"),
        ({"loss": "last", "norm_box": 1e-3}, "FT-L"),
        ({}, "FT-M"),
        ({"rank": 2}, "LoRA"),
        ({"loss": "all"}, "FineTuning"),
        ({"norm_box": 1e-3}, "FineTuning"),
    ],
)
def test_variants_have_the_literature_s_names(tmp_path, options, method):
    editor = fine_tuning(**options)
    assert editor.method == method
    assert editor.provenance()["method"] == method
    assert f"edits by {method} in" in title(trainer(), editor)


def test_single_mode_measures_what_the_model_knew_already(tmp_path):
    editor = fine_tuning(mode="single", stop=1000.0)
    fit(editor, facts(tmp_path, batch_size=1))
    assert editor.results["after"] == pytest.approx(editor.results["before"])


def test_a_checkpoint_of_another_editor_is_refused_by_name(tmp_path):
    editor = fine_tuning()
    run = fit(editor, facts(tmp_path))
    run.save_checkpoint(tmp_path / "fine_tuning.ckpt")
    with pytest.raises(ValueError, match="one of FineTuning, the configuration says MEMIT"):
        trainer().fit(memit(tmp_path), facts(tmp_path), ckpt_path=tmp_path / "fine_tuning.ckpt")
