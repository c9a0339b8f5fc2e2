"""What every library does in the benchmark of hooks, and how its result is held to be right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.inputs import token_ids

NEW_TOKENS = 64
# Strong enough that steered tokens differ from those of the untouched model.
STRENGTH = 8.0


@dataclass(frozen=True)
class Input:
    """The same for every library: a prompt, and a vector that is added to one block's output."""

    ids: Tensor
    layer: int
    vector: Tensor

    @staticmethod
    def of(model: Any, tokens: int) -> Input:
        config = model.config
        vector = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(5))
        ids = token_ids(config.vocab_size, tokens)
        return Input(ids, config.num_hidden_layers // 2, STRENGTH * vector / vector.norm())


@dataclass(frozen=True)
class Outcome:
    """What a job gave: only what it is asked for is there.

    Attributes:
        residuals: of every block's output, in order, [1, pos, d_model].
        kept: everything captured, for its count and size.
        tokens: generated ids, prompt left out.
    """

    logits: Tensor | None = None
    residuals: Sequence[Tensor] = ()
    kept: Sequence[Tensor] = ()
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Job:
    """What is timed, and how its value is read afterwards."""

    run: Callable[[], Any]
    read: Callable[[Any], Outcome]


@dataclass(frozen=True)
class Library:
    """One library with a model loaded.

    Attributes:
        reference: the plain Hugging Face model that results are compared with.
        modules: the modules that run when the library does.
        jobs: from an input to the jobs that the library can do.
    """

    reference: Any
    modules: nn.Module
    jobs: Callable[[Input], dict[str, Job]]


def load_reference(folder: str) -> Any:
    """Load the Hugging Face model as anybody would."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, each storage once."""
    found: dict[tuple[int, int], Tensor] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found.setdefault((item.data_ptr(), item.numel()), item)
        elif isinstance(item, dict):
            for part in item.values():
                visit(part)
        elif isinstance(item, tuple | list):
            for part in item:
                visit(part)

    visit(value)
    return list(found.values())
