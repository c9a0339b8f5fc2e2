"""layerscope, called the way a user would call it."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.hooks.huggingface import generate
from benchmarks.peers.hooks.job import NEW_TOKENS, Input, Job, Library, Outcome, tensors_in
from layerscope.models import Add, LanguageModel, load


def jobs(model: LanguageModel, module: Any, given: Input) -> dict[str, Job]:
    rows = given.ids.tolist()
    sites = model.sites()
    steer = [Add(f"resid_post.{given.layer}", given.vector)]

    def read(result: Any) -> Outcome:
        blocks = [f"resid_post.{layer}" for layer in range(model.n_layers)]
        captured = [result[site] for site in blocks if site in result]
        return Outcome(result.logits, captured, tensors_in(dict(result.activations)))

    return {
        "idle": Job(lambda: model.run(rows), read),
        "residuals": Job(lambda: model.run(rows, capture=["resid_pre.0", "resid_post.*"]), read),
        "every site": Job(lambda: model.run(rows, capture=sites), read),
        "edit": Job(lambda: model.run(rows, edits=steer), read),
        "decode": Job(
            lambda: model.generate(rows, max_new_tokens=NEW_TOKENS, edits=steer),
            lambda generation: Outcome(tokens=generation.ids[0]),
        ),
        # transformers' own loop on the very same module: what ours is held against.
        "decode, no edit": Job(
            lambda: generate(module, given), lambda tokens: Outcome(tokens=tokens)
        ),
    }


def build(folder: str) -> Library:
    model = load(folder)
    module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
    return Library(module, module, lambda given: jobs(model, module, given))
