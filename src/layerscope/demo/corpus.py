"""The training text: a seeded mixture of six kinds of documents, each from its own grammar.

`python -m layerscope.demo.corpus` prints a sample. Nothing here is downloaded or quoted: every
sentence comes from the grammars of this package and its small tables (`facts.csv`,
`phrasings.csv`, `words.csv`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Literal

from layerscope.demo import copying, facts, gambling, reviews, stories, tasks
from layerscope.demo.documents import Document, Item, Kind

SEED = 20
# Share of the documents of each kind. Short kinds need a larger share of documents for the same
# share of tokens, and facts are the shortest.
MIXTURE: dict[Kind, float] = {
    "facts": 0.40,
    "tasks": 0.18,
    "copying": 0.20,
    "reviews": 0.05,
    "gambling": 0.08,
    "stories": 0.09,
}
# Copying is learned late, and all at once, from long random sequences; beginning the training with
# this mixture, and with short dense sequences, brings it forward.
DRILL_MIXTURE: dict[Kind, float] = {
    "facts": 0.25,
    "tasks": 0.05,
    "copying": 0.55,
    "reviews": 0.02,
    "gambling": 0.03,
    "stories": 0.10,
}

# The last steps go over the facts again, which need the most repetition.
REVISION_MIXTURE: dict[Kind, float] = {
    "facts": 0.75,
    "tasks": 0.09,
    "copying": 0.07,
    "reviews": 0.02,
    "gambling": 0.04,
    "stories": 0.03,
}
Stage = Literal["drill", "main", "revision"]


def documents(seed: int, validation: bool = False, stage: Stage = "main") -> Iterator[Document]:
    """Yield documents without end, the same ones for the same seed.

    In the stage `drill` most of them practise copying, in `revision` most of them state facts.


    For facts, tasks and copying the validation text follows the training grammar with another
    seed (their held-out items are separate, see `held_out_items`); for the free-form kinds it is
    the share of texts that training leaves out.
    """
    rng = Random(f"{'validation' if validation else 'training'}-{seed}")
    sources: dict[Kind, Iterator[Document]] = {
        "facts": facts.revision(rng) if stage == "revision" else facts.documents(rng),
        "tasks": tasks.documents(rng),
        "copying": copying.drill(rng) if stage == "drill" else copying.documents(rng),
        "reviews": reviews.documents(rng, validation),
        "gambling": gambling.documents(rng, validation),
        "stories": stories.documents(rng, validation),
    }
    mixture = {"drill": DRILL_MIXTURE, "main": MIXTURE, "revision": REVISION_MIXTURE}[stage]
    kinds, shares = list(mixture), list(mixture.values())
    while True:
        yield next(sources[rng.choices(kinds, shares)[0]])


def held_out_items(seed: int, count: int = 300) -> dict[Kind, list[Item]]:
    """List evaluation questions per kind of text, none of which occurs in training."""
    fresh = partial(Random, f"held-out-{seed}")
    return {
        "facts": facts.held_out_items(),
        "tasks": tasks.held_out_items(fresh(), count // 2),
        "copying": copying.held_out_items(fresh(), count),
        "reviews": reviews.held_out_items(fresh(), count),
        "gambling": gambling.held_out_items(fresh(), count),
        "stories": stories.held_out_items(fresh(), count),
    }


def main() -> None:
    """Print a sample of the training text."""
    parser = argparse.ArgumentParser(description="Print a sample of the training text.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--documents", type=int, default=20)
    options = parser.parse_args()
    for document, _ in zip(documents(options.seed), range(options.documents), strict=False):
        body = document.text or f"({len(document.numbers)} tokens, {document.repeats} times)"
        sys.stdout.write(f"[{document.kind}] {body}\n\n")


if __name__ == "__main__":
    main()
