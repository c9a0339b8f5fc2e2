"""interp-engine on its eager backend, the only one without CUDA."""

from __future__ import annotations

from typing import Any

from interp_engine import SteerSpec, capture, generate_stream, load_model, steer
from interp_engine.address import Address
from interp_engine.points import Scope

from benchmarks.peers.hooks.job import NEW_TOKENS, Input, Job, Library, Outcome, tensors_in


def jobs(model: Any, given: Input) -> dict[str, Job]:
    ids = given.ids
    blocks = [Address("resid_post", layer) for layer in range(model.n_layers)]
    residuals = [Address("resid_pre", 0), *blocks]
    every = [
        address
        for point in model.points()
        for layer in ([None] if point.scope is Scope.GLOBAL else range(model.n_layers))
        if model.serves(address := Address(point.name, layer))
    ]
    spec = [SteerSpec(given.vector, given.layer)]

    def read(cache: Any) -> Outcome:
        return Outcome(
            cache.output.logits,
            [cache[block] for block in blocks if block in cache],
            tensors_in(dict(cache.tensors)),
        )

    def edit() -> Any:
        with steer(model, spec):
            return capture(model, ids, [])

    def decode() -> list[int]:
        with steer(model, spec):
            steps = generate_stream(
                model, ids, max_tokens=NEW_TOKENS, temperature=0.0, stop_at_eos=False
            )
            return [step.token_id for step in steps]

    return {
        "idle": Job(lambda: capture(model, ids, []), read),
        "residuals": Job(lambda: capture(model, ids, residuals), read),
        "every site": Job(lambda: capture(model, ids, every), read),
        "edit": Job(edit, read),
        "decode": Job(decode, lambda tokens: Outcome(tokens=tokens)),
    }


def build(folder: str) -> Library:
    model: Any = load_model(folder, backend="eager", device="cpu", dtype="float32")
    return Library(model.hf_model, model.hf_model, lambda given: jobs(model, given))
