"""The function vector: what the top heads write on average, and ways to apply it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.function_vectors.effects import Head, HeadMeans
from layerscope.interventions.function_vectors.suffix import LastToken
from layerscope.models import Add, Edit, LanguageModel, Replace, TokenBatch


@torch.no_grad()
def head_writes(model: LanguageModel, means: HeadMeans) -> dict[Head, Float[Tensor, " d_model"]]:
    """Return what each head's mean output is after its share of the output projection.

    The projection's bias belongs to no head and is in none. Read from one pass in which every head
    gives its mean, so that it holds for every backend and head layout.
    """
    names = {
        (layer, head): f"attn.{layer}.head.{head}.out"
        for layer, mean in means.items()
        for head in range(mean.shape[0])
    }
    result = model.run(
        TokenBatch.from_ids([[0]]),
        edits=[Replace(f"attn.{layer}.z", mean) for layer, mean in means.items()],
        capture=list(names.values()),
        logits=None,
    )
    return {head: result[name][0, 0].clone() for head, name in names.items()}


def function_vector(
    writes: dict[Head, Float[Tensor, " d_model"]], heads: Sequence[Head]
) -> Float[Tensor, " d_model"]:
    """Return the sum of what some heads write on average (Todd et al. 2024, equation 5)."""
    return torch.stack([writes[head] for head in heads]).double().sum(0).to(writes[heads[0]].dtype)


def finish_with_vectors(
    read: LastToken,
    vectors: Float[Tensor, "vector d_model"],
    layer: int,
    *,
    coefficient: float = 1.0,
) -> Float[Tensor, "vector prompt vocab"]:
    """Return the logits of every prompt with each vector added to block `layer` at its last token.

    All vectors and prompts are finished together, from the stored prefix.
    """
    count = len(read)
    prompts = [prompt for _ in range(len(vectors)) for prompt in range(count)]

    def edits(variants: Sequence[int]) -> list[Edit]:
        value = vectors[[variant // count for variant in variants]]
        return [Add(f"resid_post.{layer}", value[:, None], coefficient, positions=-1)]

    return read.finish(prompts, layer, edits).view(len(vectors), count, -1)


def finish_with_heads(
    read: LastToken, means: HeadMeans, heads: Sequence[Head]
) -> Float[Tensor, "prompt vocab"]:
    """Return the logits of every prompt with each head's mean put in its own place.

    The distributed variant: every head acts at its own layer, as it would in a prompt that shows
    the task, instead of all of them in one place.
    """
    ordered = sorted(heads)
    edits: list[Edit] = [
        Replace(f"attn.{layer}.head.{head}.z", means[layer][head], positions=-1)
        for layer, head in ordered
    ]
    return read.finish(range(len(read)), ordered[0][0], lambda _variants: edits)
