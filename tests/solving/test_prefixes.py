"""Context prefixes: given ones are checked, sampled ones reproducible."""

from __future__ import annotations

import pytest
import torch

from rect_lightning.solving import prefixes as module
from rect_lightning.solving.prefixes import Prefixes, sample_prefixes
from tests import tiny as tiny_models


def sampled(adapter, count=6, length=4, seed=0, **options):
    return sample_prefixes(adapter, count, length, torch.Generator().manual_seed(seed), **options)


def test_seeded(tiny):
    assert sampled(tiny) == sampled(tiny)
    assert sampled(tiny) != sampled(tiny, seed=1)
    assert Prefixes().resolve(tiny) == Prefixes().resolve(tiny)
    assert Prefixes(seed=1).resolve(tiny) != Prefixes().resolve(tiny)


def test_torchs_own_generator_is_neither_used_nor_moved(tiny):
    before = torch.get_rng_state()
    first = sampled(tiny)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert sampled(tiny) == first


def test_each_is_one_context_with_one_place_for_the_prompt(tiny):
    for text in sampled(tiny, count=20, length=8):
        assert text.endswith(". {}")
        assert text.count("{") == text.count("}") == 1
        assert "\n" not in text


def test_braces_of_the_model_are_taken_out(tiny, monkeypatch):
    """A model that says nothing but braces and line breaks."""
    said = iter(tiny.tokenizer("{}\n{" * 20)["input_ids"])
    monkeypatch.setattr(module, "_pick", lambda *_: torch.tensor([[next(said)]]))
    assert sampled(tiny, count=2, length=6) == ["The. {}", "Therefore. {}"]


def test_they_start_from_five_openings_in_turn(tiny):
    texts = sampled(tiny, count=7, length=3)
    openings = ["The", "Therefore", "Because", "I", "You", "The", "Therefore"]
    assert all(text.startswith(opening) for text, opening in zip(texts, openings, strict=True))
    assert texts[0] != texts[5]


@pytest.mark.parametrize("length", [1, 5])
def test_length_and_choice_among_the_likeliest(tiny, monkeypatch, length):
    """Each token is one of the model's five likeliest after the tokens before, computed by the plain model."""
    chosen = []
    pick = module._pick

    def listen(logits, top_k, generator):
        token = pick(logits, top_k, generator)
        chosen.append((int(token), logits))
        return token

    monkeypatch.setattr(module, "_pick", listen)
    sampled(tiny, count=3, length=length)
    assert len(chosen) == 3 * length
    ids = tiny.tokenizer("The")["input_ids"]
    for token, logits in chosen[:length]:
        with torch.no_grad():
            expected = tiny.model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits, expected)
        assert token in expected.topk(5).indices
        ids = [*ids, token]


def test_the_likeliest_alone(tiny):
    assert sampled(tiny, top_k=1) == sampled(tiny, top_k=1, seed=5)


def test_all_of_the_likeliest_get_chosen():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9, -50.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([module._pick(logits, 3, generator)[0] for _ in range(2000)])
    expected = torch.tensor([3.0, 1.0, 2.9]).softmax(0)
    share = torch.tensor([(drawn == token).float().mean() for token in (1, 2, 3)])
    assert set(drawn.tolist()) == {1, 2, 3}
    torch.testing.assert_close(share, expected, atol=0.04, rtol=0)


def test_special_tokens_stay_out_of_the_texts():
    adapter = tiny_models.adapter("llama", bos=True)
    assert not any("<s>" in text for text in sampled(adapter))


def test_a_tokenizer_that_ends_every_text(monkeypatch):
    """The model goes on from the opening, not from an end of text."""
    from tests.models.test_encoding import ending_with_eos

    adapter = tiny_models.adapter_for(tiny_models.model("llama"), ending_with_eos())
    starts = []
    adapter.backbone.register_forward_pre_hook(
        lambda _m, _a, kwargs: starts.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    sampled(adapter, count=1, length=1)
    assert starts == [[1, *tiny_models.tokenizer()("The")["input_ids"]]]


def test_resolve_puts_the_bare_prompt_first(tiny):
    found = Prefixes(count=2, lengths=(3, 5)).resolve(tiny)
    assert found[0] == "{}"
    assert len(found) == len(set(found)) == 5
    assert Prefixes(count=0).resolve(tiny) == ("{}",)
    assert Prefixes(templates=["{}", "So {}"]).resolve(tiny) == ("{}", "So {}")


@pytest.mark.parametrize("templates", [[], ["So {}"], ["{}", "So"], ["{}", "{} {}"], ["So {}", "{}"]])
def test_wrong_templates(templates):
    with pytest.raises(ValueError, match=r"must start with the bare '\{\}' and hold '\{\}' exactly once"):
        Prefixes(templates=templates)


@pytest.mark.parametrize("options", [{"count": -1}, {"lengths": (0,)}, {"lengths": (5, -2)}])
def test_wrong_numbers(options):
    with pytest.raises(ValueError, match="count >= 0 and lengths >= 1"):
        Prefixes(**options)


@pytest.mark.parametrize(
    ("options", "named"), [({"count": 2, "seed": 3}, "count and seed"), ({"lengths": (5,)}, "and lengths would")]
)
def test_sampling_beside_given_templates_is_refused(options, named):
    with pytest.raises(ValueError, match=f"{named}.*templates null"):
        Prefixes(templates=["{}"], **options)
    assert Prefixes(templates=["{}"], count=5, lengths=[10], seed=0).templates == ["{}"]
    Prefixes(**options)
