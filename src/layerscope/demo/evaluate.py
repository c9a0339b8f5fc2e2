"""Measure a model on held-out text: `python -m layerscope.demo.evaluate [MODEL_DIR]`.

The weights are read as they are stored (float16) and run in float32, as in use. Every question is
asked twice over: is the first token of the answer the likeliest one, and does greedy decoding
give the whole answer?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerscope.demo import corpus, facts, model_path
from layerscope.demo.documents import KINDS, Item

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
_BATCH = 32
_IGNORED = -100
_VALIDATION_DOCUMENTS = 800
_RANDOM_LENGTH = 50
_RANDOM_SEQUENCES = 32

Score = dict[str, float | int]
# What the model is meant to reach, as paths into the evaluation and lower bounds.
GOALS: dict[str, float] = {
    "suite/top1": 1.0,
    "facts/all/top1": 0.9,
    "copying/all/top1": 0.9,
    "tasks/antonym/top1": 0.7,
    "tasks/plural/top1": 0.7,
    "tasks/past/top1": 0.7,
    "tasks/spanish/top1": 0.7,
}


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a model folder for evaluation, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    return model.eval(), tokenizer


def _outcomes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> list[tuple[bool, bool]]:
    """For every item: is the first answer token top-1, and is the whole answer greedy?

    The answer is put after the prompt, and every one of its tokens must be the likeliest one
    there; that is the same as decoding greedily and comparing.
    """
    import torch

    results: list[tuple[bool, bool]] = []
    pad = cast(int, tokenizer.pad_token_id)
    for begin in range(0, len(items), _BATCH):
        rows: list[tuple[list[int], int]] = []
        for item in items[begin : begin + _BATCH]:
            prompt: list[int] = list(tokenizer(item.prompt)["input_ids"])  # type: ignore[arg-type]
            answer: list[int] = list(
                tokenizer(item.answer, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type]
            )
            rows.append((prompt + answer, len(answer)))
        longest = max(len(ids) for ids, _ in rows)
        # Padding stands to the right, where a causal model cannot see it.
        batch = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        with torch.no_grad():
            best = model(input_ids=batch).logits.argmax(-1)
        for (ids, count), row in zip(rows, best.tolist(), strict=True):
            end = len(ids) - 1
            right = [row[at] == ids[at + 1] for at in range(end - count, end)]
            results.append((right[0], all(right)))
    return results


def _score(outcomes: list[tuple[bool, bool]]) -> Score:
    count = len(outcomes)
    return {
        "items": count,
        "top1": round(sum(first for first, _ in outcomes) / count, 4),
        "full": round(sum(whole for _, whole in outcomes) / count, 4),
    }


def score_groups(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> dict[str, Score]:
    """Score items together (`all`) and by group."""
    outcomes = _outcomes(model, tokenizer, items)
    groups: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for item, outcome in zip(items, outcomes, strict=True):
        groups[item.group].append(outcome)
    scores = {"all": _score(outcomes)}
    if len(groups) > 1:
        scores |= {name: _score(groups[name]) for name in sorted(groups)}
    return scores


def validation_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Mean loss per token (in nats, unweighted) on validation text, by kind of text."""
    import torch

    from layerscope.demo.packing import encode

    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    documents = list(islice(corpus.documents(SEED, validation=True), _VALIDATION_DOCUMENTS))
    encoded = list(zip(documents, encode(documents, tokenizer.backend_tokenizer), strict=True))
    # Documents of similar length go together, so that little of a batch is padding.
    encoded.sort(key=lambda pair: len(pair[1].ids))
    for begin in range(0, len(encoded), _BATCH):
        some = encoded[begin : begin + _BATCH]
        longest = max(len(tokens.ids) for _, tokens in some)
        ids = torch.tensor([t.ids + [_IGNORED] * (longest - len(t.ids)) for _, t in some])
        with torch.no_grad():
            logits = model(input_ids=ids.clamp_min(0)).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none", ignore_index=_IGNORED
        )
        for (document, tokens), loss in zip(some, losses.sum(1).tolist(), strict=True):
            total[document.kind] += loss
            count[document.kind] += len(tokens.ids) - 1
    return {kind: round(total[kind] / count[kind], 4) for kind in KINDS}


def random_token_copying(model: LlamaForCausalLM, special_tokens: int) -> Score:
    """Repeat uniformly random tokens once, and measure the first and the second half."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    once = torch.randint(
        special_tokens,
        model.config.vocab_size,
        (_RANDOM_SEQUENCES, _RANDOM_LENGTH),
        generator=generator,
    )
    start = torch.full((_RANDOM_SEQUENCES, 1), cast(int, model.config.bos_token_id))
    ids = torch.cat([start, once, once], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    # The first token of the repetition cannot be foreseen, so it counts in neither half.
    second = losses[:, _RANDOM_LENGTH + 1 :]
    hits = logits.argmax(-1)[:, _RANDOM_LENGTH + 1 :] == ids[:, _RANDOM_LENGTH + 2 :]
    return {
        "sequences": _RANDOM_SEQUENCES,
        "length": _RANDOM_LENGTH,
        "loss_first_half": round(losses[:, :_RANDOM_LENGTH].mean().item(), 4),
        "loss_second_half": round(second.mean().item(), 4),
        "top1_second_half": round(hits.float().mean().item(), 4),
    }


def evaluate(folder: Path) -> dict[str, Any]:
    """Run the whole evaluation of a model folder."""
    model, tokenizer = load(folder)
    result: dict[str, Any] = {"suite": score_groups(model, tokenizer, facts.suite_items())["all"]}
    for kind, items in corpus.held_out_items(SEED).items():
        result[kind] = score_groups(model, tokenizer, items)
    result["random_tokens"] = random_token_copying(model, len(tokenizer.all_special_tokens))
    result["validation_loss"] = validation_losses(model, tokenizer)
    result["goals"] = {
        goal: {"wanted": wanted, "measured": _at(result, goal)} for goal, wanted in GOALS.items()
    }
    return result


def _at(result: dict[str, Any], path: str) -> float:
    value: Any = result
    for name in path.split("/"):
        value = value[name]
    return float(value)


def main() -> None:
    """Print the evaluation of a model folder as JSON."""
    parser = argparse.ArgumentParser(description="Evaluate the embedded model, or another folder.")
    parser.add_argument("model", type=Path, nargs="?", default=model_path())
    options = parser.parse_args()
    sys.stdout.write(json.dumps(evaluate(options.model), indent=2) + "\n")


if __name__ == "__main__":
    main()
