"""Other ways to compute the same passes, each entered for one pass and left as it was found."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from layerscope.experiments.layers.diagnostics.material import Material, States
from layerscope.experiments.layers.diagnostics.sections import Skipped
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.models import LanguageModel, load

_TORCH_BACKENDS = ("huggingface", "transformer_lens")
_KERNELS = {"sdpa": "eager", "eager": "sdpa"}
_SHARE_OF_MEMORY = 0.6  # of what is free, for a copy of the weights


@dataclass(frozen=True, eq=False)
class Variant:
    """The same passes, computed in another way.

    Attributes:
        what: what differs, in words.
        states: what came out.
        model: what reads them; None for the run's own model.
    """

    what: str
    states: States
    model: LanguageModel | None = None


def repeated(material: Material) -> list[PreparedPass]:
    """Return the passes that are run anew."""
    return material.passes[: material.settings.repeats]


def again(material: Material) -> Variant:
    """Run the same batches once more, in the very composition of the first time."""
    n = len(repeated(material))
    groups = material.groups(material.passes)
    found: list[States] = []
    for group in groups:
        found.append(material.states(group))
        if sum(len(piece.logits) for piece in found) >= n:
            break
    return Variant("the same pass twice", _joined(found, n))


def one_at_a_time(material: Material) -> Variant:
    """Run every pass in a batch of its own."""
    passes = repeated(material)
    first = material.groups(material.passes)[0]
    if len(first) == 1:
        raise Skipped("every batch of this run held one prompt; see padded_batch")
    states = _joined([material.states([item]) for item in passes], len(passes))
    return Variant(f"batches of 1 against batches of {len(first)}", states)


def padded(material: Material) -> Variant:
    """Run all passes with a longer companion, so that every row is padded."""
    passes = repeated(material)
    longest = max((item.sequence[: item.length] for item in passes), key=len)
    limit = material.model.n_ctx
    companion = [*longest, *longest][: limit or None]
    if len(companion) == len(longest):
        raise Skipped(f"the longest prompt fills the context of {limit} tokens: nothing to pad")
    states = material.states(passes, companions=[companion])
    return Variant(
        f"one batch of {len(passes) + 1}, every row padded to {len(companion)} tokens", states
    )


def other_precision(material: Material) -> Variant:
    """Run a float32 model with bfloat16 products, any other one with float32 weights."""
    model = material.model
    if model.backend.name not in _TORCH_BACKENDS:
        raise Skipped(f"the {model.backend.name} backend runs in the precision it was loaded with")
    passes = repeated(material)
    if model.dtype == torch.float32:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, cache_enabled=False):
            states = material.states(passes)
        return Variant("float32 against bfloat16 products of the same weights", states)
    copied = _in_float32(model)
    states = material.states(passes, model=copied)
    kind = str(model.dtype).removeprefix("torch.")
    return Variant(f"{kind} weights against the same weights in float32", states, copied)


def other_attention(material: Material) -> Variant:
    """Run with the other attention kernel: eager for sdpa, sdpa for anything else."""
    module: Any = getattr(material.model.backend, "model", None)
    if material.model.backend.name != "huggingface" or module is None:
        raise Skipped(
            f"the {material.model.backend.name} backend has one attention kernel; load the model "
            "with backend='huggingface' to compare two"
        )
    present = str(getattr(module.config, "_attn_implementation", None))
    other = _KERNELS.get(present, "eager")
    with _attention(module, present, other):
        states = material.states(repeated(material))
    return Variant(f"{present} against {other} attention", states)


@contextmanager
def _attention(module: Any, present: str, other: str) -> Generator[None]:
    try:
        module.set_attn_implementation(other)
    # transformers raises whatever a family's check raises; any of it means that it has no other.
    except Exception as error:
        line = " ".join(str(error).split())
        raise Skipped(f"{present} attention cannot be exchanged for {other}: {line}") from None
    try:
        yield
    finally:
        module.set_attn_implementation(present)


def _in_float32(model: LanguageModel) -> LanguageModel:
    module: Any = getattr(model.backend, "model", None)
    if model.backend.name != "huggingface" or module is None:
        raise Skipped(
            f"a float32 copy can be made of a Hugging Face model, not of {model.backend.name}"
        )
    if getattr(module, "is_quantized", False):
        raise Skipped("the weights are quantised; there is no float32 copy of them")
    values = sum(parameter.numel() for parameter in module.parameters())
    needed = 4 * values + max(p.numel() * p.element_size() for p in module.parameters())
    free = _free_bytes(model.device)
    if needed > _SHARE_OF_MEMORY * free:
        raise Skipped(
            f"a float32 copy needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; load "
            "the model in float32 to compare with bfloat16 products instead"
        )
    copied = copy.deepcopy(module).to(torch.float32)
    return load(copied, tokenizer=model.tokenizer, verify=False)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _joined(states: list[States], n: int) -> States:
    return States(
        torch.cat([piece.residual for piece in states])[:n],
        torch.cat([piece.logits for piece in states])[:n],
    )
