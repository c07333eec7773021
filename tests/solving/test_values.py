"""The batched target value search against the same search done naively, see `tests.solving.naive_values`."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from rect_lightning.data import EditRequest
from rect_lightning.models.encoding import Row
from rect_lightning.solving import values
from rect_lightning.solving.blocks import Tail
from rect_lightning.solving.search_batches import SearchRows, padding_share
from rect_lightning.solving.texts import search_rows
from rect_lightning.solving.values import ValueSearch, search_values
from tests import tiny as tiny_models
from tests.solving.naive_values import doubled, naive_search

# Adam divides by the gradient's size, so rounding is amplified from step to step wherever a gradient nearly vanishes.
# Over six evaluations the batched search in fp32 was within 2e-5 of the naive one in all of these tests, mostly within
# 3e-6, which is also how far the naive one in fp32 is from float64. What the tests are to find costs far more.
TOLERANCE = 1e-4
LAYER = 1
SEARCH = ValueSearch(steps=6, lr=0.2, weight_decay=0.1, clamp=100, kl=1.0, stop=0)
TEMPLATES = ["{}", "The. {}", "Therefore, it is so. {}"]
LONG = "Therefore, it is so. Because of this fact. I think so. You know it. The official religion of {} is"
# (subject, prompt, target), in this order not sorted by any length; the fourth ends in its subject
FACTS = [
    ("Danielle Darrieux", "The mother tongue of {} is", "English"),
    ("The Eiffel Tower", "{} is located in the city of", "Rome"),
    ("Edwin of Northumbria", LONG, "French"),
    ("Spain", "What is the capital of {}", "of"),
    ("LeBron James", "{} plays the sport of", "table tennis"),
]


def rows_of(adapter, templates=TEMPLATES, facts=FACTS):
    requests = [
        EditRequest(id=str(i), subject=subject, prompt=prompt, target_new=target)
        for i, (subject, prompt, target) in enumerate(facts)
    ]
    return search_rows(adapter, requests, templates)


def fp32_tail(adapter, layer=LAYER):
    return Tail(adapter, layer, torch.float32)


def relative(found, expected):
    """The largest relative error of a row."""
    difference = (found.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1).clamp(min=1e-12)).max())


def assert_same(found, expected):
    assert relative(found.value, expected.value) < 1e-5
    assert relative(found.stream, expected.stream) < 1e-5
    assert torch.equal(found.losses.isnan(), expected.losses.isnan()), "stopped at another step"
    torch.testing.assert_close(found.losses.double(), expected.losses.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert relative(found.offset, expected.offset) < TOLERANCE


def test_the_facts_are_varied():
    rows = rows_of(tiny_models.adapter("gpt2"))
    lengths = [len(row.target_ids) for row, *_ in (r.targets for r in rows)]
    assert min(lengths) == 1
    assert len(set(lengths)) >= 4
    after = [len(row.ids) - 1 - row.subject for row, *_ in (r.targets for r in rows)]
    assert min(after) == 1
    assert after != sorted(after)
    assert rows[2].targets[0].subject > 20, "the sliding windows of 16 are to be left behind"


# families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family(family):
    """All terms of the loss, three prefixes, several chunks, several buckets a chunk, one clamp that holds."""
    adapter = tiny_models.adapter(family)
    rows = rows_of(adapter)
    tail = fp32_tail(adapter)
    free = search_values(adapter, tail, rows, SEARCH)
    size = free.offset.norm(dim=-1) / free.stream.norm(dim=-1)
    search = replace(SEARCH, clamp=float(size.quantile(0.5)) * 0.9)
    expected = naive_search(doubled(adapter), LAYER, rows, search)
    limited = expected.offset.norm(dim=-1) / expected.stream.norm(dim=-1) > search.clamp * 0.9999
    assert limited.any()
    assert_same(search_values(adapter, tail, rows, replace(search, together=3), budget=24), expected)


@pytest.mark.parametrize("prefixes", [1, 3])
@pytest.mark.parametrize(
    ("count", "one_is_long"), [(12, False), (16, False), (24, False), (40, False), (100, False), (12, True)]
)
def test_many_requests_have_little_padding(prefixes, count, one_is_long):
    """As long after the subject as CounterFact's are, by their frequency there."""
    draw = random.Random(count)
    for _ in range(20):
        lengths = draw.choices(range(2, 9), weights=[35, 21, 52, 37, 39, 11, 5], k=count)
        if one_is_long:
            lengths[0] = 50
        requests = [
            SearchRows(
                targets=(Row(ids=(0,) * (columns + 5), target=columns + 4, subject=4),) * prefixes,
                essence=Row(ids=(0,) * 4, target=4, subject=3),
            )
            for columns in lengths
        ]
        for budget in (384, 1024):
            assert padding_share(requests, ValueSearch().together, budget) < 0.2


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_stops_each_request_at_its_own_step(family):
    adapter = tiny_models.adapter(family)
    rows = rows_of(adapter, TEMPLATES[:2])
    search = replace(SEARCH, weight_decay=0.0, kl=0.0625)
    tail = fp32_tail(adapter)
    free = search_values(adapter, tail, rows, search, relative_to="value", budget=400).losses
    search = replace(search, stop=stop_that_divides(free))
    expected = naive_search(doubled(adapter), LAYER, rows, search, "value")
    evaluations = (~expected.losses.isnan()).sum(1)
    assert len(evaluations.unique()) >= 3
    assert_same(search_values(adapter, tail, rows, search, relative_to="value", budget=40), expected)


def stop_that_divides(losses):
    """A threshold, far from every loss, at which the requests stop after as many different numbers of steps as can be."""
    values = losses.flatten().unique()
    gaps = values.diff() > 1e-3
    candidates = ((values[1:] + values[:-1]) / 2)[gaps].tolist()

    def distinct(stop):
        return len({next((s for s, x in enumerate(row) if x < stop), len(row) - 1) for row in losses.tolist()})

    return max(candidates, key=distinct)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_long_prompt_feels_the_window(family):
    """What the other tests say of sliding windows holds only if these change the numbers."""
    adapter = tiny_models.adapter(family)
    rows = rows_of(adapter, ["{}"])[2:3]
    with_window = naive_search(adapter, LAYER, rows, SEARCH)
    wide = tiny_models.model(family)
    text = wide.config.to_dict() | {"sliding_window": 128}
    wide = type(wide)(type(wide.config)(**text)).eval().requires_grad_(False)
    wide.load_state_dict(adapter.model.state_dict())
    without = naive_search(tiny_models.adapter_for(wide, adapter.tokenizer), LAYER, rows, SEARCH)
    assert relative(without.offset, with_window.offset) > 100 * TOLERANCE


# options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relative_to", "options"),
    [
        ("value", {"kl": 3.0, "lr": 0.5}),
        ("stream", {"kl": 0.0}),
        ("stream", {"weight_decay": 0.0}),
        ("stream", {"weight_decay": 2.0}),
        ("value", {"weight_decay": 2.0}),
        ("stream", {"clamp": 0.05}),
        ("value", {"clamp": 0.05}),
        ("stream", {"steps": 1}),
        ("stream", {"steps": 2}),
        ("stream", {"kl": 0.0, "weight_decay": 0.0, "lr": 1.0}),
    ],
    ids=str,
)
def test_options(tiny, relative_to, options):
    search = replace(SEARCH, **options)
    rows = rows_of(tiny, TEMPLATES[:2])
    expected = naive_search(tiny, LAYER, rows, search, relative_to)
    assert_same(search_values(tiny, fp32_tail(tiny), rows, search, relative_to=relative_to), expected)


def test_each_option_changes_the_numbers(tiny):
    """Else the tests above would compare nothing."""
    rows = rows_of(tiny, ["{}"])
    base = naive_search(tiny, LAYER, rows, SEARCH)
    for options in ({"kl": 0.0}, {"weight_decay": 0.0}, {"clamp": 0.05}, {"lr": 0.5}):
        other = naive_search(tiny, LAYER, rows, replace(SEARCH, **options))
        assert relative(other.offset, base.offset) > 10 * TOLERANCE, options
    decayed = replace(SEARCH, weight_decay=2.0)
    by_value = naive_search(tiny, LAYER, rows, decayed, "value").offset
    assert relative(by_value, naive_search(tiny, LAYER, rows, decayed).offset) > 10 * TOLERANCE


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_other_layers(tiny, layer):
    """After the last layer there is no block left, and only a target right after the subject can be reached."""
    rows = rows_of(tiny, TEMPLATES[:2])
    # without KL: where the target cannot be reached its gradient alone is left, zero but for rounding at the first
    # step, of which Adam makes a whole step in no particular direction
    search = replace(SEARCH, weight_decay=0.0, kl=0.0)
    expected = naive_search(tiny, layer, rows, search)
    assert_same(search_values(tiny, fp32_tail(tiny, layer), rows, search), expected)


def test_bos_tokenizer():
    adapter = tiny_models.adapter("llama", bos=True)
    rows = rows_of(adapter)
    assert all(row.ids[0] == adapter.tokenizer.bos_token_id for r in rows for row in r.targets)
    expected = naive_search(adapter, LAYER, rows, SEARCH)
    assert_same(search_values(adapter, fp32_tail(adapter), rows, SEARCH, budget=24), expected)


@pytest.mark.parametrize(("chunk", "budget"), [(1, 1024), (64, 1), (2, 12)])
def test_chunks_and_buckets_change_nothing_but_the_speed(tiny, chunk, budget):
    rows = rows_of(tiny, TEMPLATES[:2])
    tail = fp32_tail(tiny)
    whole = search_values(tiny, tail, rows, replace(SEARCH, together=64), budget=100_000)
    assert_same(search_values(tiny, tail, rows, replace(SEARCH, together=chunk), budget=budget), whole)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_logits_part_by_part(monkeypatch, tiny, size):
    rows = rows_of(tiny, TEMPLATES[:2])
    whole = search_values(tiny, fp32_tail(tiny), rows, SEARCH)
    monkeypatch.setattr(values, "_LOGITS", size)
    assert_same(search_values(tiny, fp32_tail(tiny), rows, SEARCH), whole)


def test_results_come_in_the_order_of_the_requests(tiny):
    rows = rows_of(tiny, ["{}"])
    tail = fp32_tail(tiny)
    forwards = search_values(tiny, tail, rows, replace(SEARCH, together=2))
    backwards = search_values(tiny, tail, rows[::-1], replace(SEARCH, together=2))
    for name in ("value", "stream", "offset", "losses"):
        torch.testing.assert_close(getattr(backwards, name).flip(0), getattr(forwards, name), rtol=1e-4, atol=1e-5)
    assert relative(forwards.offset, backwards.offset) > 0.1, "the requests are too alike to tell their order"


def test_a_request_may_be_given_twice(tiny):
    rows = rows_of(tiny)[:2]
    found = search_values(tiny, fp32_tail(tiny), [rows[0], rows[1], rows[0]], SEARCH)
    assert_same(found, naive_search(tiny, LAYER, [rows[0], rows[1], rows[0]], SEARCH))


def test_a_state_of_small_norm(tiny):
    """Weight decay over a small ``‖h₀‖²`` is a large number, which the first step, from zero, must survive."""
    weight = tiny.weight(LAYER).data
    weight *= 0.01
    if getattr(tiny.projection(LAYER), "bias", None) is not None:
        tiny.projection(LAYER).bias.data.zero_()
    rows = rows_of(tiny, ["{}"])
    # one step: the next gradient is a thousand times the first, and from there on Adam amplifies rounding so much that
    # the naive search in fp32 is itself 1e-4 away from float64 after six evaluations
    search = replace(SEARCH, weight_decay=0.5, steps=2)
    expected = naive_search(doubled(tiny), LAYER, rows, search, "value")
    assert expected.value.norm(dim=-1).max() < 0.1
    assert expected.offset.isfinite().all()
    assert_same(search_values(tiny, fp32_tail(tiny), rows, search, relative_to="value"), expected)


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}, {"lr": -1.0}, {"clamp": 0.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="steps >= 1, lr > 0, clamp > 0"):
        ValueSearch(**options)


# precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_bf16_tail_finds_nearly_the_same(family):
    adapter = tiny_models.adapter(family)
    rows = rows_of(adapter)  # prefixes, so that rows are padded and masks cast
    search = replace(SEARCH, weight_decay=0.0, lr=0.05)
    exact = search_values(adapter, fp32_tail(adapter), rows, search)
    rough = search_values(adapter, Tail(adapter, LAYER, torch.bfloat16), rows, search)
    assert torch.equal(rough.value, exact.value)
    assert torch.equal(rough.stream, exact.stream)
    assert rough.offset.dtype == torch.float32
    assert torch.cosine_similarity(rough.offset, exact.offset).min() > 0.95
    torch.testing.assert_close(rough.losses, exact.losses, rtol=0.02, atol=0.02)
    assert not torch.equal(rough.offset, exact.offset), "the tail was not in bf16"


# memory -----------------------------------------------------------------------------------------------------------


def test_what_a_search_takes_does_not_grow_with_the_requests(tiny, monkeypatch):
    """Of a chunk the bytes of its buckets, of a pass the logits, and how many rows each of the batches has."""
    requests, tail = rows_of(tiny) * 80, Tail(tiny, LAYER, torch.bfloat16)
    weighed, rows, logits = [], set(), []
    prepare, step, head = values._prepare, values._loss_and_gradient, Tail.logits

    def prepare_and_weigh(*args):
        found = prepare(*args)
        weighed.append(sum(b.hidden.nbytes + b.value.nbytes + b.reference.nbytes for b in found[0]))
        return found

    def step_and_count(adapter, tail, buckets, *args, **kwargs):
        rows.update(len(bucket.owner) for bucket in buckets if bucket)
        return step(adapter, tail, buckets, *args, **kwargs)

    def head_and_count(tail, states):
        logits.append(len(states))
        return head(tail, states)

    monkeypatch.setattr(values, "_prepare", prepare_and_weigh)
    monkeypatch.setattr(values, "_loss_and_gradient", step_and_count)
    monkeypatch.setattr(Tail, "logits", head_and_count)
    search = replace(SEARCH, steps=3, together=16, weight_decay=0.0)
    free = search_values(tiny, tail, requests[:5], search)
    search = replace(search, stop=stop_that_divides(free.losses))
    weighed.clear(), rows.clear()
    search_values(tiny, tail, requests[:16], search)
    few = max(weighed)
    search_values(tiny, tail, requests, search)
    assert len(weighed) == 1 + 25
    assert max(weighed) < 1.5 * few, "the longest are in one chunk"
    assert weighed[1] == max(weighed[1:]), "the longest chunk comes first"
    assert max(logits) <= 64
    assert len(rows) > 3
    assert max(rows) <= 96


# what is left behind ----------------------------------------------------------------------------------------------


def state_of(model):
    """All that a search could leave behind in a model or in torch."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "needs": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: [list(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        "forwards": {name: m.__dict__.get("forward") for name, m in modules.items()},
        "attention": model.config._attn_implementation,
        "training": model.training,
        "random": torch.get_rng_state().clone(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_untouched(model, before):
    after = state_of(model)
    weights = before.pop("weights")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in after.pop("weights").items())
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["nothing", "the edited weight", "everything"])
def test_nothing_is_left_behind(tiny, dtype, trainable):
    tiny.model.requires_grad_(trainable == "everything")
    tiny.weight(LAYER).requires_grad_(trainable != "nothing")
    before = state_of(tiny.model)
    search_values(tiny, Tail(tiny, LAYER, dtype), rows_of(tiny), SEARCH)
    assert_untouched(tiny.model, before)


@pytest.mark.parametrize("passes", [0, 1, 8, 30])
def test_nothing_is_left_behind_by_an_error(tiny, passes):
    """Whether it comes while the states are prepared or in the midst of the search."""
    count = iter(range(1000))

    def fail(*_):
        if next(count) >= passes:
            raise RuntimeError("out of memory")

    tail = fp32_tail(tiny)
    block: Any = tiny.blocks[0] if passes == 0 else tail.blocks[0]
    handle = block.mlp.register_forward_hook(fail)
    before = state_of(tiny.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        search_values(tiny, tail, rows_of(tiny), replace(SEARCH, steps=20))
    assert_untouched(tiny.model, before)
    handle.remove()


def test_a_block_whose_forward_was_wrapped_keeps_the_wrapper(tiny):
    """As libraries do that place a model's blocks on several devices."""
    block = tiny.blocks[LAYER + 1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    wrapper = block.forward
    search_values(tiny, fp32_tail(tiny), rows_of(tiny, ["{}"]), SEARCH)
    assert block.__dict__.get("forward") is wrapper


def test_autocast_does_not_reach_the_search(tiny):
    rows = rows_of(tiny, ["{}"])
    expected = search_values(tiny, fp32_tail(tiny), rows, SEARCH)
    with torch.autocast("cpu", torch.bfloat16):
        found = search_values(tiny, fp32_tail(tiny), rows, SEARCH)
    assert torch.equal(found.offset, expected.offset)


def test_a_bf16_tail_is_a_copy(tiny):
    rows = rows_of(tiny, ["{}"])
    tail = Tail(tiny, LAYER, torch.bfloat16)
    expected = search_values(tiny, tail, rows, SEARCH)
    kept = copy.deepcopy(tiny.model.state_dict())
    for block in list(tiny.blocks)[LAYER + 1 :]:
        for parameter in block.parameters():
            parameter.data.mul_(3)
    assert torch.equal(search_values(tiny, tail, rows, SEARCH).offset, expected.offset)
    tiny.model.load_state_dict(kept)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_request():
    adapter = tiny_models.adapter("llama")
    request = EditRequest(id="r7", subject="LeBron James", prompt="{} plays", target_new="tennis")
    rows = search_rows(adapter, [request], ["{}"])
    with torch.no_grad():
        adapter.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite for the requests r7"):
        search_values(adapter, Tail(adapter, 1, torch.float32), rows, ValueSearch(steps=2))
