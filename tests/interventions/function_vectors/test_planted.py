"""The planted function vector: the head, the effects and the accuracies are known in advance."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from layerscope.interventions.function_vectors.effects import (
    indirect_effects,
    mean_heads,
    probabilities,
    top_heads,
)
from layerscope.interventions.function_vectors.suffix import LastToken
from layerscope.interventions.function_vectors.vector import (
    finish_with_heads,
    finish_with_vectors,
    function_vector,
    head_writes,
)
from layerscope.models import Replace
from support.toy_function_vector import CARRIER, HEADS, planted, probability_of, shown

TASKS = range(1, 8)
PROMPTS = 60


@cache
def toy():
    return planted()


@cache
def studied(shift):
    """Return the prompts, means, shuffled prompts read, and effects of one task."""
    prompts = shown(shift, PROMPTS)
    targets = [prompt.target for prompt in prompts]
    means = mean_heads(toy(), [prompt.clean for prompt in prompts], targets)
    read = LastToken(toy(), [prompt.shuffled for prompt in prompts])
    effects = {layer: indirect_effects(read, means.heads, layer, targets) for layer in range(3)}
    return prompts, means, read, effects


def test_one_head_carries_the_task_and_the_others_have_no_effect_at_all():
    mean = torch.stack(
        [torch.stack([studied(shift)[3][layer].mean(1) for layer in range(3)]) for shift in TASKS]
    ).mean(0)
    others = [float(mean[head]) for head in HEADS if head != CARRIER]
    assert max(map(abs, others)) < 1e-12
    # By hand: the mean restores certainty, and the shuffled examples vote.
    by_hand = [
        1.0 - probability_of(shift, prompt.votes) for shift in TASKS for prompt in studied(shift)[0]
    ]
    expected = sum(by_hand) / len(by_hand)
    assert float(mean[CARRIER]) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.858, abs=0.025)


@pytest.mark.parametrize("shift", (1, 5))
def test_the_resumed_path_equals_one_forward_per_head(shift):
    prompts, means, _, effects = studied(shift)
    targets = torch.tensor([prompt.target for prompt in prompts])
    texts = [prompt.shuffled for prompt in prompts]
    for layer, head in HEADS:
        edit = Replace(f"attn.{layer}.head.{head}.z", value=means.heads[layer][head], positions=-1)
        plain = toy().run(texts, logits="last").logits[:, -1]
        edited = toy().run(texts, edits=[edit], logits="last").logits[:, -1]
        naive = probabilities(edited, targets) - probabilities(plain, targets)
        torch.testing.assert_close(effects[layer][head], naive, rtol=0, atol=1e-12)


def accuracy(logits, targets):
    return float((logits.argmax(-1) == torch.tensor(targets)).double().mean())


def test_accuracies_are_those_that_were_planted():
    clean, shuffled, zero, shuffled_with, zero_with, at_own_place = ([] for _ in range(6))
    for shift in TASKS:
        prompts, means, read, effects = studied(shift)
        targets = [prompt.target for prompt in prompts]
        heads = top_heads({head: float(effects[head[0]][head[1]].mean()) for head in HEADS}, 1)
        assert heads == (CARRIER,)
        vector = function_vector(head_writes(toy(), means.heads), heads)
        alone = LastToken(toy(), [prompt.zero_shot for prompt in prompts])
        clean.append(sum(means.answered) / PROMPTS)
        shuffled.append(accuracy(read.logits, targets))
        zero.append(accuracy(alone.logits, targets))
        shuffled_with.append(accuracy(finish_with_vectors(read, vector[None], 1)[0], targets))
        zero_with.append(accuracy(finish_with_vectors(alone, vector[None], 1)[0], targets))
        at_own_place.append(accuracy(finish_with_heads(alone, means.heads, heads), targets))
    average = [sum(each) / 7 for each in (clean, zero, zero_with, at_own_place)]
    assert average == [1.0, 0.0, 1.0, 1.0]
    assert sum(shuffled) / 7 == pytest.approx(0.151, abs=0.04)
    # Where the shuffled votes agree on another shift, one more vote of weight one does not decide.
    assert sum(shuffled_with) / 7 == pytest.approx(1.0, abs=1e-12)
