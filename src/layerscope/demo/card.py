"""Write `evaluation.json` and `MODEL_CARD.md` for a trained model folder, from measurements only.

`python -m layerscope.demo.card DIR` evaluates the folder anew and writes both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from layerscope.demo import facts, tasks
from layerscope.demo.corpus import MIXTURE
from layerscope.demo.documents import KINDS
from layerscope.demo.evaluate import evaluate
from layerscope.demo.vocabulary import CONTEXT, VOCABULARY_SIZE

_CONTENT = {
    "facts": "capital, currency and main language of {countries} countries, in {phrasings} "
    "phrasings; a fixed tenth of the (country, phrasing) pairs and the ten prompts of the "
    "built-in suite are held out",
    "tasks": "lists of four to nine examples of one task (antonym, plural, past tense, English "
    "to Spanish) over {words} words in {formats} list formats; a fixed tenth of the (task, word, "
    "format) triples is held out",
    "copying": "random words, letters, invented names or arbitrary tokens, repeated two to six "
    "times, random walks, and look-up lists",
    "reviews": "reviews of films, books, restaurants and hotels, for or against, with a judgement",
    "gambling": "a slot-machine player's situation and decision (bet or stop), by a rule with 4 % "
    "of the decisions turned round",
    "stories": "small stories with agreeing pronouns, and sentences that say who has which thing",
}

_CARD = """# Model card: the embedded model of layerscope

A Llama-style language model of {parameters:,} parameters, trained on generated text.
It ships with layerscope so that every lens, hook and experiment can be tried on a real model
without a download. It is a specimen to look into, not an assistant.

- Architecture: `LlamaForCausalLM`, {layers} layers, width {width}, {heads} heads sharing
  {kv_heads} key-value heads, SwiGLU of {inner}, RMSNorm, rotary positions, tied embeddings,
  context of {context} tokens
- Tokenizer: byte-level BPE of {vocabulary:,} tokens; it puts one `<|bos|>` before a text
- Files: {megabytes:.1f} MB in all; the weights are stored as float16 and run in float32
- Licence: Apache-2.0, like layerscope itself

## Training

`python -m layerscope.demo.train --out DIR --steps {steps}` made it: {steps:,} steps of {rows}
rows of {context} tokens ({tokens:,} tokens of freshly drawn text), with Muon for
the matrices inside the layers and AdamW for the rest, in bfloat16 autocast on a CPU with two
workers of one thread each. It took {minutes} minutes by the clock, on a machine that had other work
to do. The seed is {seed}; the text is the same in every run, while the weights may differ from
machine to machine by the rounding of floating-point arithmetic.

Tokens that the text so far determines count in full in the training loss, ordinary ones less, and
random ones hardly at all. The first {drill} steps drill copying, with short dense sequences; from
step {revision} on most documents state facts.

The start was not blank. Heads 0 and 1 of layer 0 began with a preference for the previous token,
and heads 0 and 1 of layer 2 with a preference for places whose previous token is the present one
(see `start_induction` in `demo/train.py`), because in a trial run from a random start no such
heads had formed after 1,250 steps. Training changed them as it changed all weights. Do not cite
this model as evidence that induction heads emerge, or where.

## Data

All text comes from the grammars in `layerscope/demo` and their tables (`facts.csv`,
`phrasings.csv`, `words.csv`). Nothing was downloaded or quoted.

| Kind | Share of documents | Content |
| --- | ---: | --- |
{content}

## Evaluation

Measured by `python -m layerscope.demo.evaluate` on the shipped files, on items that are not in
the training text. *First token* is the share of items where the first token of the right answer
is the likeliest; *whole answer* is the share where greedy decoding gives all of it.

| Items | Count | First token | Whole answer |
| --- | ---: | ---: | ---: |
{scores}

None of these items was trained on, but they were looked at: the last stage of training, and how
rarely it uses the wording "is called simply", were chosen after an earlier state had missed the
first two goals on them. Read the scores as those of a development set. The weights come from a
run that was interrupted and resumed while its length was settled; the recipe records the learning
rates and stages as they were, but has not been run again in one go.

Reviews ask for the judgement at the end of a review, gambling for the decision that the rule
gives where no thought is told before it, stories for who has which thing.

Uniformly random tokens, {length} of them and then the same again: the loss is
{loss_first} nats per token the first time and {loss_second} the second time, where
{top1_random} of the tokens are the likeliest ones.

Loss on validation text, in nats per token (all tokens count alike, random ones too):

| Kind | Loss |
| --- | ---: |
{losses}

Goals set before training:

| Goal | Wanted | Measured | Met |
| --- | ---: | ---: | --- |
{goals}

## Intended use

Trying out, teaching and testing interpretability methods: logit lenses, hooks, patching, steering,
attention patterns. The behaviours above (facts, in-context tasks, copying, sentiment, risk) are
the ones to study with it.

## Limits

- It knows only the sentences of its grammars. Other text, other languages and other questions get
  meaningless answers.
- Its facts are a snapshot of a small table, each cut down to one word where several answers are
  possible (main language, currency unit).
- Its gambler follows a rule written for this corpus; it says nothing about people.
- Mechanisms found in it need not exist in larger models trained on natural text.
- The accuracies above hold for items drawn from the same grammars, not for free wording.
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _content_rows() -> str:
    counts = {
        "countries": len(facts.facts_table()),
        "phrasings": len(facts.phrasings()),
        "words": len(tasks.word_table()),
        "formats": len(tasks.FORMATS),
    }
    return "\n".join(
        f"| {kind} | {_percent(MIXTURE[kind])} | {_CONTENT[kind].format(**counts)} |"
        for kind in KINDS
    )


def _score_rows(result: dict[str, Any]) -> str:
    rows = [("built-in suite", result["suite"])]
    for kind in KINDS:
        for group, score in result[kind].items():
            rows.append((kind if group == "all" else f"{kind}: {group}", score))
    return "\n".join(
        f"| {name} | {score['items']} | {_percent(score['top1'])} | {_percent(score['full'])} |"
        for name, score in rows
    )


def _goal_rows(goals: dict[str, Any]) -> str:
    return "\n".join(
        f"| {name} | {_percent(goal['wanted'])} | {_percent(goal['measured'])} | "
        f"{'yes' if goal['measured'] >= goal['wanted'] else '**no**'} |"
        for name, goal in goals.items()
    )


def card_text(folder: Path, run: dict[str, Any], result: dict[str, Any]) -> str:
    """Fill in the card from the training run's record and the evaluation."""
    recipe, random_tokens = run["recipe"], result["random_tokens"]
    shipped = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    return _CARD.format(
        parameters=run["parameters"],
        layers=recipe["layers"],
        width=recipe["width"],
        heads=recipe["heads"],
        kv_heads=recipe["key_value_heads"],
        inner=recipe["inner"],
        context=CONTEXT,
        vocabulary=VOCABULARY_SIZE,
        megabytes=sum((folder / name).stat().st_size for name in shipped) / 1e6,
        steps=recipe["steps"],
        rows=recipe["rows"],
        tokens=run["tokens"],
        minutes=run["minutes"],
        seed=recipe["seed"],
        drill=recipe["drill"],
        revision=recipe["revision"],
        content=_content_rows(),
        scores=_score_rows(result),
        length=random_tokens["length"],
        loss_first=random_tokens["loss_first_half"],
        loss_second=random_tokens["loss_second_half"],
        top1_random=_percent(random_tokens["top1_second_half"]),
        losses="\n".join(f"| {k} | {v} |" for k, v in result["validation_loss"].items()),
        goals=_goal_rows(result["goals"]),
    )


def document(folder: Path) -> None:
    """Evaluate a folder written by the trainer, and write its evaluation and its card."""
    run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    result = evaluate(folder)
    text = json.dumps(result, indent=2)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    card = card_text(folder, run, result)
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Evaluate and document a model folder."""
    parser = argparse.ArgumentParser(description="Write a trained model's evaluation and card.")
    parser.add_argument("model", type=Path)
    document(parser.parse_args().model)


if __name__ == "__main__":
    main()
