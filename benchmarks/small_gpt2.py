"""Train a small GPT-2 on prose and on the made-up facts of `benchmarks.world`, to edit them afterwards.

    OMP_NUM_THREADS=1 python -m benchmarks.small_gpt2 small_gpt2 --prose wikipedia.txt
    python -m rect_lightning fit --config small_gpt2/rome.yaml

The folder gets the model and its tokenizer in Hugging Face's format; ``requests.jsonl``, edits of its facts; the data of its
abilities; ``rome.yaml``, which edits it and measures them; and ``report.json``, what it learned. The prose is any text with a
blank line between documents, of which every 40th is held out. The same seed, machine and number of threads give the same
weights.
"""

# No `from __future__ import annotations`: the command line reads the types of `train`.

import json
import platform
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.world import Ability, Fact, build_abilities, build_facts, edit_requests, mixed_texts
from rect_lightning.data.prose import prose_path
from rect_lightning.metrics import score_targets
from rect_lightning.models import Adapter, adapter_for
from rect_lightning.tasks import Generation, MultipleChoice, Perplexity, Task, measure

PROSE = 0.25
"""Share of the training rows that is prose."""
SHARES = {"recall": 0.6, "sentiment": 0.06, "kinds": 0.14, "sums": 0.2}
"""Shares of the texts in the other rows."""
ROME: dict[str, Any] = {
    "layers": [1],
    "search": {"steps": 40, "lr": 0.5, "weight_decay": 0.001, "clamp": 48, "kl": 0.0625},
    "prefixes": {"count": 5, "lengths": [10]},
    "moments": None,
    "mode": "sequential",
}
"""What edits this model well: the values of its early layers are small, hence the clamp, which is relative to them."""
_END = "<|endoftext|>"


class Learner(LightningModule):
    """A language model under AdamW, whose learning rate rises for a twentieth of the run and then falls to zero."""

    def __init__(self, network: torch.nn.Module, *, lr: float, steps: int) -> None:
        super().__init__()
        self.network, self.lr, self.steps = network, lr, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a token of the rows."""
        (rows,) = batch
        loss: Tensor = self.network(input_ids=rows, labels=rows).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, with a schedule by steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        warmup = max(1, self.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    out: Path,
    *,
    prose: str = "prose",
    seed: int = 0,
    people: int = 160,
    steps: int = 3600,
    batch_size: int = 4,
    lr: float = 3e-3,
    layers: int = 6,
    width: int = 160,
    heads: int = 5,
    context: int = 128,
    vocabulary: int = 3072,
) -> None:
    """Train the model, measure what it learned, and write all files.

    Args:
        out: The folder to write.
        prose: A text file, or "prose" for the one that comes with the package.
        seed: Of the world, the weights and the order of the rows.
        people: How many people there are; three in four get three edit requests.
        steps: Optimizer steps.
        batch_size: Rows in a step.
        lr: The highest learning rate.
        layers: Blocks.
        width: Of the residual stream; the MLPs are four times as wide.
        heads: Attention heads.
        context: Tokens of a row, and the longest input that the model reads.
        vocabulary: Tokens of the vocabulary.
    """
    seed_everything(seed)
    facts = build_facts(people=people, seed=seed)
    abilities = build_abilities(facts)
    told, held_out = split_prose(prose_path(prose, option="prose").read_text(encoding="utf-8"))
    # enough of them for the parts of names to become tokens beside all the prose
    sample = [*islice(mixed_texts(abilities, SHARES, seed=seed), 50 * people)]
    tokenizer = train_tokenizer([*told, *sample], vocabulary)
    rows = training_rows(tokenizer, told, mixed_texts(abilities, SHARES, seed=seed), steps * batch_size, context)
    network = new_model(tokenizer, layers=layers, width=width, heads=heads, context=context)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=CSVLogger(out, name="training", version=""),
        log_every_n_steps=25,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    began = time.perf_counter(), time.process_time()
    trainer.fit(
        Learner(network, lr=lr, steps=steps), DataLoader(TensorDataset(rows), batch_size=batch_size, shuffle=True)
    )
    ended = time.perf_counter(), time.process_time()
    network.eval()
    out.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    _write_lines(out / "requests.jsonl", edit_requests(facts, seed=seed))
    for ability in abilities:
        _write_lines(out / f"{ability.name}.jsonl", ability.records)
    (out / "rome.yaml").write_text(yaml.safe_dump(rome_config(out, abilities), sort_keys=False), encoding="utf-8")

    adapter = adapter_for(network, tokenizer)
    learned = fact_accuracies(adapter, facts) | ability_scores(adapter, out, abilities)
    report = {
        "learned": learned,
        "seed": seed,
        "steps": steps,
        "tokens": rows.numel(),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "training_seconds": round(ended[0] - began[0]),
        "training_cpu_seconds": round(ended[1] - began[1]),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


def split_prose(text: str, every: int = 40) -> tuple[list[str], list[str]]:
    """The documents to train on, and every 40th, which is held out.

    Raises:
        ValueError: There is only one.
    """
    documents = [document.strip() for document in text.split("\n\n") if document.strip()]
    if len(documents) < 2:
        raise ValueError(
            "the prose needs two documents, one to train on and one to hold out; put a blank line between."
        )
    return [document for i, document in enumerate(documents) if i % every], documents[::every]


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer as GPT-2's, with one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)


def training_rows(tokenizer: Any, prose: list[str], texts: Iterator[str], count: int, context: int) -> Tensor:
    """Rows of token ids, ``[count, context]``: prose, cut where a row is full, then texts, of which each row begins with one.

    Prompts are asked without a token in front, so the model has to know them there.
    """
    end = tokenizer.eos_token_id
    running = [token for ids in tokenizer(prose)["input_ids"] for token in (*ids, end)]
    of_prose = round(PROSE * count)
    places = torch.arange(of_prose)[:, None] * context + torch.arange(context)
    rows = [torch.tensor(running)[places % len(running)]]
    packed: list[list[int]] = []
    row: list[int] = []
    while len(packed) < count - of_prose:
        for ids in tokenizer([*islice(texts, 1000)])["input_ids"]:
            row += [*ids, end]
            if len(row) >= context:
                packed.append(row[:context])
                row = []
    return torch.cat([*rows, torch.tensor(packed[: count - of_prose], dtype=torch.int64).reshape(-1, context)])


def new_model(tokenizer: Any, *, layers: int, width: int, heads: int, context: int) -> Any:
    """A GPT-2 with random weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def fact_accuracies(adapter: Adapter, facts: list[Fact]) -> dict[str, float]:
    """Share of facts whose every token is the likeliest, in phrasings that they were told in and in held-out ones."""
    found = {}
    for name, phrasings in (("told", lambda fact: fact.told), ("held_out", lambda fact: fact.held_out)):
        asked = [(phrasing.format(fact.subject), fact.answer) for fact in facts for phrasing in phrasings(fact)]
        scores = score_targets(adapter, [prompt for prompt, _ in asked], [answer for _, answer in asked])
        found[f"facts/{name}"] = sum(score.exact for score in scores) / len(scores)
    return found


def ability_scores(adapter: Adapter, folder: Path, abilities: list[Ability]) -> dict[str, float]:
    """The scores of the abilities, and perplexity on the prose that was held out."""
    classes = {"Generation": Generation, "MultipleChoice": MultipleChoice}
    tasks: list[Task] = [classes[a.task](**_options(folder, a)) for a in abilities]
    tasks.append(Perplexity(path=str(folder / "held_out.txt"), tokens=20_000))
    results = [measure(adapter, task, scoring="standard") for task in tasks]
    return {name: score.value for result in results for name, score in result.scores.items()}


def rome_config(folder: Path, abilities: list[Ability]) -> dict[str, Any]:
    """A configuration that edits the first 100 requests one after the other and measures every 20 edits."""
    tasks = [
        {"class_path": f"rect_lightning.tasks.{ability.task}", "init_args": _options(folder, ability)}
        for ability in abilities
    ]
    held_out = str(folder / "held_out.txt")
    tasks.append({"class_path": "rect_lightning.tasks.Perplexity", "init_args": {"path": held_out, "tokens": 20_000}})
    side_effects = {"tasks": tasks, "every_n_edits": 20, "limit": None, "scoring": "standard"}
    return {
        "model": {
            "class_path": "rect_lightning.editors.ROME",
            "init_args": {"base": {"name": str(folder)}, **ROME, "prose": held_out},
        },
        "data": {"path": str(folder / "requests.jsonl"), "batch_size": 1, "limit": 100},
        "trainer": {
            "accelerator": "cpu",
            "callbacks": [{"class_path": "rect_lightning.callbacks.SideEffects", "init_args": side_effects}],
        },
    }


def _options(folder: Path, ability: Ability) -> dict[str, Any]:
    return {"name": ability.name, "path": str(folder / f"{ability.name}.jsonl"), **ability.options}


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(train)
