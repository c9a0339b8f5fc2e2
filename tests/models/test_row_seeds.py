"""A seed for each row: the same numbers for the same seed, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.models.generation.sampling import Sampler, Sampling


def drawn(logits: list[list[float]], seeds: tuple[int, ...]) -> list[int]:
    sampler = Sampler(Sampling(temperature=1.0, seed=seeds), [[1, 2]] * len(seeds))
    return sampler.choose(torch.tensor(logits))[0]


def test_rows_of_one_seed_and_prompt_draw_alike_wherever_they_stand() -> None:
    row = [0.3, 0.1, -0.2, 0.0]
    seeds = tuple(range(40))
    alone = [drawn([row], (seed,))[0] for seed in seeds]
    assert drawn([row] * 40, seeds) == alone
    assert drawn([row] * 40, seeds[::-1]) == alone[::-1]
    assert len(set(alone)) > 2
    assert len(set(drawn([row] * 20, (7,) * 20))) == 1


def test_a_moved_distribution_changes_draws_one_way() -> None:
    """Also where the likelier of two tokens becomes the other one."""
    seeds = tuple(range(400))
    before = drawn([[0.4, 0.0]] * 400, seeds)
    after = drawn([[0.0, 0.4]] * 400, seeds)
    changes = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    assert changes == {(0, 1)}
    moved = sum(a != b for a, b in zip(before, after, strict=True)) / 400
    assert moved == pytest.approx(0.197, abs=0.06)  # sigmoid(0.4) - sigmoid(-0.4)


def test_the_nucleus_is_the_same_as_without_row_seeds() -> None:
    row = torch.tensor([[0.0, 3.0, 2.5, -4.0]] * 200)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=tuple(range(200)))
    assert set(Sampler(sampling, [[1]] * 200).choose(row)[0]) == {1, 2}


def test_one_seed_for_each_prompt_is_needed() -> None:
    with pytest.raises(ConfigError, match="2 seeds were given for 3 prompts"):
        Sampler(Sampling(seed=(1, 2)), [[1]] * 3)
