"""Which heads carry a task: the average indirect effect of each (Todd et al. 2024, section 2.3).

The mean output of a head over prompts that show the task is put in its place at the last token of
prompts that do not. How much more likely the answer becomes is the head's indirect effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import PromptError
from layerscope.interventions.function_vectors.suffix import LastToken
from layerscope.models import Edit, LanguageModel, Replace

Head = tuple[int, int]
HeadMeans: TypeAlias = Mapping[int, Float[Tensor, "head d_head"]]
"""By layer, what each head gives on average."""


@dataclass(frozen=True, eq=False)
class Means:
    """Mean head outputs at the last token, over prompts that the model answers.

    Attributes:
        heads: by layer.
        answered: per prompt, whether its likeliest next token was the answer.
        only_answered: False where no prompt was answered, and the mean is over all of them.
    """

    heads: HeadMeans
    answered: tuple[bool, ...]
    only_answered: bool


def mean_heads(
    model: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[int],
    *,
    only_answered: bool = True,
    batch_size: int = 32,
) -> Means:
    """Average every head's output at the last token of the prompts that the model answers.

    Args:
        model: the model.
        prompts: with the query at their end.
        targets: id of each answer's first token.
        only_answered: leave out prompts whose answer is not the likeliest token.
        batch_size: prompts of one pass; does not change the result beyond rounding.

    Raises:
        PromptError: there is no prompt, or none that the model answers.
    """
    if not prompts:
        raise PromptError("there is no prompt to average over")
    sums: dict[int, Tensor] = {}
    answered: list[bool] = []
    for begin in range(0, len(prompts), batch_size):
        read = LastToken(model, prompts[begin : begin + batch_size])
        wanted = torch.tensor(targets[begin : begin + batch_size], device=read.logits.device)
        right = read.logits.argmax(-1) == wanted
        answered += right.tolist()
        kept = right if only_answered else torch.ones_like(right)
        for layer, z in read.z.items():
            part = z[kept.to(z.device)].double().sum(0)
            sums[layer] = sums[layer] + part if layer in sums else part
    count = sum(answered) if only_answered else len(answered)
    if not count:
        raise PromptError(
            f"the model answers none of the {len(prompts)} prompts, so there is no task to be "
            "found: use more examples, another layout or another model"
        )
    means = {layer: (total / count).to(model.dtype) for layer, total in sums.items()}
    return Means(means, tuple(answered), only_answered)


def indirect_effects(
    read: LastToken, means: HeadMeans, layer: int, targets: Sequence[int]
) -> Float[Tensor, "head prompt"]:
    """Return how much each head of a layer raises the answer's probability in each prompt.

    The causal indirect effect: P(answer | the head's output := its mean) - P(answer), at the last
    token. All heads of all prompts are finished together, from the stored prefix.
    """
    n_heads = means[layer].shape[0]
    z = read.z[layer]
    prompts = [prompt for _ in range(n_heads) for prompt in range(len(read))]
    heads = [head for head in range(n_heads) for _ in range(len(read))]
    mean = means[layer].to(z.device, z.dtype)

    def edits(variants: Sequence[int]) -> list[Edit]:
        value = z[[prompts[variant] for variant in variants]].clone()
        which = [heads[variant] for variant in variants]
        value[torch.arange(len(which)), which] = mean[which]
        return [Replace(f"attn.{layer}.z", value[:, None], positions=-1)]

    wanted = torch.tensor(targets, device=read.logits.device)
    base = probabilities(read.logits, wanted)
    after = probabilities(read.finish(prompts, layer, edits), wanted.repeat(n_heads))
    return after.view(n_heads, len(read)) - base


def probabilities(
    logits: Float[Tensor, "row vocab"], targets: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Return the probability of one token per row, in float64."""
    logprobs = logits.double().log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0].exp()


def bootstrap_mean(
    values: np.ndarray, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of a percentile bootstrap interval of the mean over the last axis."""
    rng = np.random.default_rng(seed)
    count = values.shape[-1]
    weights = rng.multinomial(count, np.full(count, 1.0 / count), size=draws) / count
    means = values @ weights.T  # the same resamples for all rows, which keeps their ranking honest
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high


def top_heads(effects: Mapping[Head, float], count: int) -> tuple[Head, ...]:
    """Return the heads of the largest effects, ties by layer and head."""
    ranked = sorted(effects, key=lambda head: (-effects[head], head))
    return tuple(ranked[:count])
