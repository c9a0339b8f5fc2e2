"""pyvene: a model that is wrapped once for every set of interventions."""

from __future__ import annotations

from typing import Any

import pyvene
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

# Its names of places in a Llama block, without those of single heads.
COMPONENTS = (
    "block_input",
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
    "attention_output",
    "mlp_input",
    "mlp_activation",
    "mlp_output",
    "block_output",
)


def collecting(model: Any, components: tuple[str, ...]) -> Any:
    """Wrap a model so that these places of every block are collected, at all positions."""
    places = [
        {
            "layer": layer,
            "component": component,
            "intervention": pyvene.CollectIntervention(keep_last_dim=True),
        }
        for layer in range(model.config.num_hidden_layers)
        for component in components
    ]
    return pyvene.IntervenableModel(places, model=model)


def jobs(model: Any, given: Input) -> dict[str, Job]:
    base = {"input_ids": given.ids}
    idle = pyvene.IntervenableModel([], model=model)
    residuals = collecting(model, ("block_output",))
    every = collecting(model, COMPONENTS)
    addition = pyvene.AdditionIntervention(source_representation=given.vector)
    place = {"layer": given.layer, "component": "block_output", "intervention": addition}
    steering = pyvene.IntervenableModel([place], model=model)

    def read(step: int) -> Any:
        def outcome(value: Any) -> Outcome:
            (_, collected), output = value
            return Outcome(output.logits, collected[step - 1 :: step], tensors_in(collected))

        return outcome

    def decode() -> Tensor:
        _, tokens = steering.generate(
            {**base, "attention_mask": given.ids.new_ones(given.ids.shape)},
            intervene_on_prompt=True,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return tokens

    return {
        "idle": Job(lambda: idle(base)[0], lambda output: Outcome(output.logits)),
        "residuals": Job(lambda: residuals(base), read(1)),
        "every site": Job(lambda: every(base), read(len(COMPONENTS))),
        "edit": Job(lambda: steering(base)[1], lambda output: Outcome(output.logits)),
        "decode": Job(
            decode, lambda tokens: Outcome(tokens=tokens[0, given.ids.shape[1] :].tolist())
        ),
    }


def build(folder: str) -> Library:
    model = load_reference(folder)
    return Library(model, model, lambda given: jobs(model, given))
