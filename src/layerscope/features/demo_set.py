"""Train the dictionaries of the embedded model: `python -m layerscope.features.demo_set --out DIR`.

One BatchTopK dictionary for the residual stream after every block, or with `--transcoders` one
transcoder for every MLP, on text of the grammars that the model was trained on, with more of the
slot machine than there. Killed, it goes on where it stopped. It ends with the card, written from
what was measured on held-out text.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from layerscope.demo import corpus, gambling, model_path
from layerscope.demo.documents import Document
from layerscope.demo.packing import encode
from layerscope.features.training import Trained, TrainOptions, train_dictionaries
from layerscope.files import write_json, write_text
from layerscope.lenses.fitting.drive import Progress
from layerscope.models.batches import TokenBatch
from layerscope.models.language_model import LanguageModel, load
from layerscope.models.sites import Site

_log = logging.getLogger(__name__)

SEED = 41
GAMBLING = 0.3  # share of the documents drawn from the slot machine alone
TOKENS = 400_000
HELD_OUT = 40_000
ROWS = 64
CARD, RECORD = "CARD.md", "training.json"
OPTIONS = TrainOptions(k=32, expansion=8, steps=1200, batch=768, learning_rate=2e-3, seed=SEED)
TRANSCODERS = replace(OPTIONS, transcoder=True, k=16, expansion=1.75)

_DICTIONARIES = """# Card: dictionaries of the embedded model

Sparse autoencoders of the residual stream after every block of the embedded model (width
{d_model}), {features:,} features each, in the format of SAELens.
`layerscope.demo.dictionaries_path()` is their folder. Made to try feature methods on a real model
without a download.
"""
_TRANSCODERS = """# Card: transcoders of the embedded model

One for every MLP of the embedded model (width {d_model}), {features:,} features each, in the format
of SAELens: from what the MLP reads, behind its norm, to what it writes.
`layerscope.demo.transcoders_path()` is their folder. Made for attribution graphs without a
download, and few features, so that they fit into the package.
"""
_ABOVE = """ More than 100% is a loss below the model's own: on this text, a little of what an MLP
writes and its transcoder does not explain hurts."""
_CARD = """{what}
`python -m layerscope.features.demo_set{flag} --out DIR`
made them in {minutes} minutes on a share of one CPU core: BatchTopK with k = {k}, {steps:,} steps
of {batch:,} tokens out of {tokens:,}, seed {seed}, auxiliary loss for dead features; stored as
JumpReLU with the one threshold per layer at which {k} features are active on average. Text: the
grammars of `layerscope.demo`, {gambling:.0%} of the documents from the slot machine beside the
usual mixture. Matrices are stored as float16 and read as float32.

## Figures

On {rows:,} tokens of held-out text. The first token of every text (BOS) is left out, in training
and here: what a dictionary says of a BOS means nothing. FVU: share of variance not explained. Dead:
active nowhere on the held-out text. Loss in nats per token with {replaced} replaced by
the reconstruction at all tokens but the first; recovered: of the way from zero ablation back to the
model's own loss.{note}

| Site | FVU | L0 | Dead | Loss | Model's own | Recovered | FVU, slot machine | L0, slot machine |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

## Limits

The model knows only its grammars, and so do the features. They were not named or judged by anyone.
Neighbouring layers were trained separately; the same index means nothing across layers.
"""


def documents(seed: int, *, validation: bool = False) -> Iterator[Document]:
    """Yield documents without end: the mixture of the corpus, and more of the slot machine."""
    rng = Random(f"dictionaries-{'validation' if validation else 'training'}-{seed}")
    every = corpus.documents(seed + 1_000, validation)
    machine = gambling.documents(rng, validation)
    while True:
        yield next(machine) if rng.random() < GAMBLING else next(every)


def batches(
    model: LanguageModel, tokens: int, *, validation: bool = False, machine: bool = False
) -> list[TokenBatch]:
    """Return padded batches of whole documents, of similar length within a batch."""
    tokenizer: Any = model.tokenizer
    source = documents(SEED, validation=validation)
    if machine:
        source = gambling.documents(Random(f"dictionaries-{SEED}"), validation)
    rows: list[list[int]] = []
    count = 0
    for encoded in encode(islice(source, tokens), tokenizer.backend_tokenizer):
        rows.append(encoded.ids)
        count += len(encoded.ids)
        if count >= tokens:
            break
    rows.sort(key=len)
    groups = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
    return [TokenBatch.from_ids(group) for group in groups]


def main() -> None:
    """Train, measure, and write the card."""
    parser = argparse.ArgumentParser(description="Train the embedded model's dictionaries.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--transcoders", action="store_true", help="of the MLPs")
    parser.add_argument("--layers", type=int, nargs="*", help="only these")
    parser.add_argument("--steps", type=int, default=OPTIONS.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    started = time.monotonic()
    model = load(model_path(), device="cpu", dtype="float32")
    wanted = TRANSCODERS if arguments.transcoders else OPTIONS
    options = replace(wanted, steps=arguments.steps)
    kind = "mlp_in" if options.transcoder else "resid_post"
    layers = arguments.layers or range(model.n_layers)
    train, held_out = batches(model, TOKENS), batches(model, HELD_OUT, validation=True)
    trained = train_dictionaries(
        model,
        train,
        held_out,
        [Site(kind, layer) for layer in layers],
        arguments.out,
        options=options,
        store_dtype=torch.float16,
        progress=_say,
    )
    minutes = (time.monotonic() - started) / 60
    document(model, trained, arguments.out, options, minutes, sum(sum(b.lengths) for b in train))


def document(
    model: LanguageModel,
    trained: list[Trained],
    folder: Path,
    options: TrainOptions,
    minutes: float,
    tokens: int,
) -> None:
    """Write the record and the card, with the figures on the slot machine alone."""
    from layerscope.features.figures import collect, measure
    from layerscope.features.library import load as load_dictionary

    machine = batches(model, HELD_OUT // 4, validation=True, machine=True)
    rows: list[dict[str, Any]] = []
    for one in trained:
        dictionary = load_dictionary(one.folder)
        target = options.target(one.site)
        there = collect(model, machine, list(dict.fromkeys((one.site, target))))
        found = measure(dictionary, there[one.site], there[target])
        rows.append(
            {
                "site": str(one.site),
                **{k: one.figures[k] for k in ("fvu", "l0", "dead", "rows", "loss")},
                "slot_machine": found.to_dict(),
            }
        )
    record: dict[str, Any] = {"options": asdict(options), "tokens": tokens, "figures": rows}
    if not any(one.resumed for one in trained):
        record["minutes"] = round(minutes, 1)
    write_json(folder / RECORD, record)
    what = _TRANSCODERS if options.transcoder else _DICTIONARIES
    text = _CARD.format(
        what=what.format(d_model=model.d_model, features=options.features(model.d_model)),
        flag=" --transcoders" if options.transcoder else "",
        note=_ABOVE if options.transcoder else "",
        replaced="the MLP's output" if options.transcoder else "the site",
        minutes=round(minutes, 1),
        k=options.k,
        steps=options.steps,
        batch=options.batch,
        tokens=tokens,
        seed=options.seed,
        gambling=GAMBLING,
        rows=rows[0]["rows"],
        table="\n".join(_row(row) for row in rows),
    )
    write_text(folder / CARD, text)


def _row(row: dict[str, Any]) -> str:
    loss, machine = row["loss"], row["slot_machine"]
    cells = (
        f"`{row['site']}`",
        f"{row['fvu']:.3f}",
        f"{row['l0']:.1f}",
        f"{row['dead']:.1%}",
        f"{loss['reconstructed']:.3f}",
        f"{loss['clean']:.3f}",
        f"{loss['recovered']:.1%}",
        f"{machine['fvu']:.3f}",
        f"{machine['l0']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _say(site: Site, state: Progress) -> None:
    if state.step % 50 == 0 or state.step == state.steps:
        _log.info(
            "%s step %d of %d: %s, %.0f s", site, state.step, state.steps, state.note, state.seconds
        )


if __name__ == "__main__":
    main()
