r"""How much free answers depend on how a model is asked: an edited model under several instructions.

    python -m rect_lightning fit --config memit_smollm2.yaml --data.path counterfact.jsonl --data.limit 100 \
        --data.batch_size 100 --trainer.callbacks null
    python -m benchmarks.contexts runs/version_0/checkpoints/last.ckpt counterfact.jsonl --count 100

A row for each way of asking: the share of the requests whose answer is the new target and nothing else, and of those whose
answer begins with it or has it anywhere, in normalised words; and the answer to the first request.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import rect_lightning
from benchmarks.output import write
from rect_lightning.data.readers import parse_requests
from rect_lightning.metrics.generation import normalised_words
from rect_lightning.metrics.wild import FreeAnswer, Wild, free_answers
from rect_lightning.models import adapter_for

CLAUSE = (*Wild().stops, ",")


def ways(tokenizer: PreTrainedTokenizerBase) -> dict[str, Wild]:
    """What is compared: the public instruction, also as a chat if the model has a template for that, and none."""
    found = {"instruction": Wild()}
    if tokenizer.chat_template:
        message = [{"role": "user", "content": Wild().context.removesuffix("\nA:")}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        found["instruction, as a chat"] = Wild(context=str(chat))
    return found | {"prompt alone": Wild(context="{}"), "prompt alone, up to a comma": Wild(context="{}", stops=CLAUSE)}


def holds(answer: FreeAnswer) -> bool:
    """Whether the target's words stand in the answer, one after the other."""
    words, wanted = normalised_words(answer.text), normalised_words(answer.target)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint, patch or exported folder of an edited model")
    parser.add_argument("requests", type=Path, help="the file with its requests")
    parser.add_argument("--count", type=int, default=100, help="of how many of them, from the first on")
    parser.add_argument("--out", type=Path, help="file for the table; printed if not given")
    args = parser.parse_args(arguments)
    model = rect_lightning.load_edited(args.model)
    adapter = adapter_for(model, AutoTokenizer.from_pretrained(model.name_or_path))
    requests = parse_requests(args.requests)[: args.count]
    prompts, targets = [request.text for request in requests], [request.target_new for request in requests]
    lines = ["| asked by | exact | begins | holds | such as |", "|---|---|---|---|---|"]
    for name, wild in ways(adapter.tokenizer).items():
        answers = free_answers(adapter, prompts, targets, wild)
        shares = (
            fmean(answer.exact for answer in answers),
            fmean(answer.begins for answer in answers),
            fmean(holds(answer) for answer in answers),
        )
        lines.append(
            f"| {name} | "
            + " | ".join(f"{share:.3f}" for share in shares)
            + f" | {answers[0].text.replace('|', ' ')} |"
        )
    text = "\n".join(lines) + "\n"
    write(text, args.out)


if __name__ == "__main__":
    main()
