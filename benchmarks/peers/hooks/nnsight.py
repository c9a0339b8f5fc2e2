"""nnsight: everything happens in traces, and nothing can return from inside one."""

from __future__ import annotations

from typing import Any

from nnsight import LanguageModel
from torch import Tensor

from benchmarks.peers.hooks.job import (
    NEW_TOKENS,
    Input,
    Job,
    Library,
    Outcome,
    load_reference,
    tensors_in,
)


def jobs(model: Any, given: Input) -> dict[str, Job]:
    ids, layer, vector = given.ids, given.layer, given.vector
    blocks = model.model.layers
    n_layers = len(blocks)

    def idle() -> Tensor:
        with model.trace(ids):
            logits = model.output.logits.save()
        return logits  # noqa: RET504

    def residuals() -> tuple[Tensor, list[Any]]:
        with model.trace(ids):
            kept = list().save()  # noqa: C408
            for index in range(n_layers):  # a comprehension would leave the trace's scope
                kept.append(blocks[index].output)
            logits = model.output.logits.save()
        return logits, kept

    def every() -> tuple[Tensor, Any]:
        with model.trace(ids) as tracer:
            cache = tracer.cache(include_inputs=True)
            logits = model.output.logits.save()
        return logits, cache

    def edit() -> Tensor:
        with model.trace(ids):
            blocks[layer].output = blocks[layer].output + vector
            logits = model.output.logits.save()
        return logits  # noqa: RET504

    def decode() -> Tensor:
        with model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            for _ in tracer.iter[:NEW_TOKENS]:
                blocks[layer].output = blocks[layer].output + vector
            tokens = tracer.result.save()
        return tokens  # noqa: RET504

    def read_every(value: tuple[Tensor, Any]) -> Outcome:
        logits, cache = value
        outputs = [cache[f"model.model.layers.{index}"].output for index in range(n_layers)]
        entries = [(cache[path].output, cache[path].inputs) for path in cache.keys()]  # noqa: SIM118
        return Outcome(logits, outputs, tensors_in(entries))

    return {
        "idle": Job(idle, Outcome),
        "residuals": Job(
            residuals,
            lambda value: Outcome(value[0], value[1], tensors_in(value[1])),
        ),
        "every site": Job(every, read_every),
        "edit": Job(edit, Outcome),
        "decode": Job(decode, lambda value: Outcome(tokens=value[0, ids.shape[1] :].tolist())),
    }


def build(folder: str) -> Library:
    model = LanguageModel(folder, device_map="cpu", dispatch=True)
    return Library(load_reference(folder), model._module, lambda given: jobs(model, given))
