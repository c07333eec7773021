"""The controls of RECT: Random, PCA and Shrink, against their definitions."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from rect_lightning.callbacks import PCA, RECT, Random, Shrink
from tests.callbacks.test_rect import assert_same, changed, left
from tests.callbacks.training import KINDS, Model, adamw, fit, fit_with_a_stop, sgd, truncated, updates, weights


@pytest.mark.parametrize("optimizer", KINDS)
def test_random_keeps_exactly_its_share(optimizer):
    before, pairs, logged = updates(Random(0.3), optimizer)
    for name, (update, kept) in pairs.items():
        mask = kept != 0
        assert int(mask.sum()) == round(0.3 * mask.numel()) == round(logged[f"random/{name}/kept"] * mask.numel())
        torch.testing.assert_close(kept[mask], update[mask])
    assert before.keys() == pairs.keys()


def masks(callback, steps=2, optimizer=sgd):
    class Masks(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, *_):
            self.last = weights(module)

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append({n: weights(module)[n] != w for n, w in self.last.items()})

    seen = Masks()
    fit(Model(optimizer), callback, seen, steps=steps)
    return [mask["layers.0.weight"] for mask in seen.seen]


def test_random_follows_from_seed_step_and_parameter():
    first, second = masks(Random())
    again, _ = masks(Random())
    other, _ = masks(Random(seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    both = Random()._mask("a", torch.zeros(50)), Random()._mask("b", torch.zeros(50))
    assert not torch.equal(*both)


def test_random_over_a_run_is_one_choice():
    class Chosen(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(weights(module)["layers.0.weight"] != before["layers.0.weight"])

    module, seen = Model(adamw), []
    before = weights(module)
    fit(module, Random(0.3, scope="run", start_step=0), Chosen(), steps=4)
    assert changed(before, weights(module)) == {n: round(0.3 * w.numel()) for n, w in before.items()}
    assert all(torch.equal(mask, seen[0]) for mask in seen)


@pytest.mark.parametrize("optimizer", KINDS)
def test_pca_leaves_the_leading_components(optimizer):
    """The first layer's update is of rank 2 under SGD, since the second has two outputs, and of full rank under AdamW."""
    for of in ("rank", "dimension", "energy"):
        _, pairs, logged = updates(PCA(0.5, of=of), optimizer)
        for name, (update, kept) in pairs.items():
            if update.ndim != 2:
                torch.testing.assert_close(kept, update)
                continue
            singular = torch.linalg.svdvals(update.double())
            rank = 2 if update.shape == (2, 8) or optimizer is not adamw else 6
            energy = singular.square().cumsum(0) / singular.square().sum()
            count = {"rank": rank // 2, "dimension": len(singular) // 2, "energy": int((energy < 0.5).sum()) + 1}[of]
            assert logged[f"pca/{name}/components"] == count
            torch.testing.assert_close(kept, truncated(update, count), atol=2e-6, rtol=1e-4)
            assert logged[f"pca/{name}/norm"] == pytest.approx(float(kept.norm() / update.norm()), rel=1e-3)


@pytest.mark.parametrize("of", ["rank", "dimension", "energy"])
def test_pca_leaves_a_rank_one_update_as_it_is(of):
    class One(Model):
        def training_step(self, batch, batch_idx):
            return self.layers(batch[:1])[0, 0]

    optimizer = lambda m: torch.optim.SGD(m.layers[0].parameters(), 0.5)  # noqa: E731
    free, module = One(optimizer), One(optimizer)
    fit(free)
    fit(module, PCA(0.1, of=of))
    torch.testing.assert_close(weights(module), weights(free), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("optimizer", KINDS)
def test_shrink_by_a_factor(optimizer):
    _, pairs, logged = updates(Shrink(0.7), optimizer)
    for name, (update, kept) in pairs.items():
        torch.testing.assert_close(kept, 0.7 * update, atol=1e-7, rtol=1e-4)
        assert logged[f"shrink/{name}/norm"] == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("optimizer", KINDS)
def test_shrink_to_the_norm_that_rect_leaves(optimizer):
    before, pairs, _ = updates(Shrink(like_rect=0.3), optimizer)
    for name, (update, kept) in pairs.items():
        rect = left({name: before[name]}, {name: before[name] + update}, 0.3)[name] - before[name]
        assert float(kept.norm()) == pytest.approx(float(rect.norm()), rel=1e-4)
        torch.testing.assert_close(kept / kept.norm(), update / update.norm(), atol=1e-5, rtol=1e-4)


def test_shrink_over_a_run_can_be_left_to_its_end():
    """And is done once, though the end of a run is seen three times."""
    free, module = Model(adamw), Model(adamw)
    before = weights(module)
    fit(free, steps=5)
    fit(module, Shrink(0.5, scope="run", start_step=99), steps=5)
    torch.testing.assert_close(weights(module), {n: (before[n] + w) / 2 for n, w in weights(free).items()})


def test_they_act_in_the_order_of_the_list():
    """RECT of half of an update keeps the same entries; half of its norm after RECT is another half."""
    for optimizer in KINDS:
        found = [Model(optimizer), Model(optimizer)]
        free = Model(optimizer)
        before = weights(free)
        fit(free)
        fit(found[0], PCA(0.1), RECT(0.3))
        fit(found[1], RECT(0.3), PCA(0.1))
        name = "layers.0.weight"
        update = weights(free)[name] - before[name]
        pca_first = left({name: before[name]}, {name: before[name] + truncated(update, 1)}, 0.3)[name] - before[name]
        rect = left({name: before[name]}, {name: before[name] + update}, 0.3)[name] - before[name]
        got = [weights(module)[name] - before[name] for module in found]
        torch.testing.assert_close(got[0], pca_first, atol=2e-6, rtol=1e-3)
        torch.testing.assert_close(got[1], truncated(rect, 1), atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"scope": "run"}, {"every_n_steps": 4}], ids=str)
@pytest.mark.parametrize(
    "make", [partial(Random, 0.3), partial(PCA, 0.5), partial(Shrink, like_rect=0.3)], ids=["Random", "PCA", "Shrink"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(make, options, tmp_path):
    whole, resumed = fit_with_a_stop(partial(make, **options), tmp_path)
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Random(0), "Random's keep is a share"),
        (lambda: Random(40), "Random's keep is a share"),
        (lambda: PCA(1.1), "PCA's keep is a share"),
        (lambda: PCA(of="count"), "rank, dimension or energy; got 'count'"),
        (lambda: Shrink(), "either a factor or like_rect"),
        (lambda: Shrink(0.5, like_rect=0.4), "either a factor or like_rect"),
        (lambda: Shrink(0.0), "Shrink's factor is a share"),
        (lambda: Shrink(like_rect=40), "Shrink's like_rect is a share"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
