"""steering-vectors: hooks within a context manager, on the plain model."""

from __future__ import annotations

from typing import Any

from steering_vectors import SteeringVector, record_activations
from torch import Tensor

from benchmarks.peers.hooks.huggingface import generate
from benchmarks.peers.hooks.job import Input, Job, Library, Outcome, load_reference, tensors_in


def jobs(model: Any, given: Input) -> dict[str, Job]:
    steering = SteeringVector({given.layer: given.vector}, "decoder_block")

    def residuals() -> tuple[Tensor, list[Tensor]]:
        with record_activations(model, layer_type="decoder_block") as recorded:
            logits = model(given.ids, use_cache=False).logits
        return logits, [recorded[layer][0] for layer in sorted(recorded)]

    def edit() -> Tensor:
        with steering.apply(model):
            return model(given.ids, use_cache=False).logits

    def decode() -> list[int]:
        with steering.apply(model):
            return generate(model, given)

    return {
        "residuals": Job(residuals, lambda value: Outcome(*value, tensors_in(value[1]))),
        "edit": Job(edit, Outcome),
        "decode": Job(decode, lambda tokens: Outcome(tokens=tokens)),
    }


def build(folder: str) -> Library:
    model = load_reference(folder)
    return Library(model, model, lambda given: jobs(model, given))
