"""Hugging Face with hooks by hand: the reference, and what hooks cost at least."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from benchmarks.peers.hooks.job import NEW_TOKENS, Input, Job, Library, Outcome, load_reference


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def steered(model: Any, given: Input) -> Generator[None]:
    """Add the vector to one block's output."""

    def add(_module: Any, _args: Any, output: Any) -> Any:
        changed = first(output) + given.vector
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.model.layers[given.layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def residuals(model: Any, given: Input) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and every block's output, from hooks by hand."""
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append(first(output))

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    try:
        logits = model(given.ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, kept


def generate(model: Any, given: Input) -> list[int]:
    """Return the greedy continuation by transformers' own loop."""
    ids = model.generate(
        given.ids,
        attention_mask=given.ids.new_ones(given.ids.shape),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return ids[0, given.ids.shape[1] :].tolist()


def expected(model: Any, given: Input, job: str) -> Outcome:
    """Return what a job must give."""
    if job == "decode":
        with steered(model, given):
            return Outcome(tokens=generate(model, given))
    if job == "edit":
        with steered(model, given):
            return Outcome(model(given.ids, use_cache=False).logits)
    return Outcome(*residuals(model, given))


def jobs(model: Any, given: Input) -> dict[str, Job]:
    def edit() -> Tensor:
        with steered(model, given):
            return model(given.ids, use_cache=False).logits

    def decode() -> list[int]:
        with steered(model, given):
            return generate(model, given)

    return {
        "residuals": Job(
            lambda: residuals(model, given), lambda value: Outcome(value[0], value[1], value[1])
        ),
        "edit": Job(edit, Outcome),
        "decode": Job(decode, lambda tokens: Outcome(tokens=tokens)),
        "decode, no edit": Job(
            lambda: generate(model, given), lambda tokens: Outcome(tokens=tokens)
        ),
    }


def build(folder: str) -> Library:
    model = load_reference(folder)
    return Library(model, model, lambda given: jobs(model, given))
