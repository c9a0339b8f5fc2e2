"""Choosing the next token: greedily, or drawn from the model's distribution with a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: what logits are divided by before drawing; 0 takes the most likely token.
        top_p: draw among the most likely tokens whose probabilities reach this sum (the nucleus of
            Holtzman et al. 2020); 1 for all.
        top_k: draw among so many most likely tokens; None for all.
        seed: of the draws. A row's draws depend on the seed and its own prompt alone (and on how
            many equal prompts stand before it), so a batch draws what its rows draw alone. With a
            seed for each row, rows of equal prompt and seed draw the same numbers, so that their
            answers can be compared pair by pair.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be 0 (greedy) or a positive number, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more (None for all tokens), got {self.top_k}")


class Sampler:
    """Chooses one token per row and step."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        self._sampling = sampling
        given = sampling.seed
        seeds = (given,) * len(prompts) if isinstance(given, int) else given
        if len(seeds) != len(prompts):
            raise ConfigError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
        seen: dict[tuple[int, ...], int] = {}
        self._draws: list[torch.Generator] = []
        for seed, prompt in zip(seeds, map(tuple, prompts), strict=True):
            seen[prompt] = seen.get(prompt, -1) + 1
            occurrence = seen[prompt] if isinstance(given, int) else 0
            self._draws.append(_generator(seed, prompt, occurrence))

    def choose(self, logits: Float[Tensor, "row vocab"]) -> tuple[list[int], list[float]]:
        """Return each row's token and its log-probability in nats.

        The log-probability is the model's own: before temperature, top_k and top_p.

        Raises:
            ModelError: the logits of a row are no numbers.
        """
        logprobs = torch.log_softmax(logits.detach().float(), dim=-1)
        if self._sampling.temperature == 0.0:
            chosen = logits.argmax(dim=-1)
        else:
            rows = logits.detach().to("cpu", torch.float64)
            drawn = [self._draw(row, draw) for row, draw in zip(rows, self._draws, strict=True)]
            chosen = torch.tensor(drawn, device=logits.device)
        values = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        for row, value in enumerate(values):
            if value != value:
                raise ModelError(
                    f"the logits of prompt {row} are not finite: edit with smaller values, or load "
                    "the model in a wider dtype"
                )
        return chosen.tolist(), values

    def _draw(self, logits: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
        """Draw by inverting the distribution function over tokens from most to least likely.

        With a seed for each row the nucleus is gone through by id instead: rows that draw the same
        number then take the same token unless its share of the distribution has moved.
        """
        point = torch.rand((), dtype=torch.float64, generator=generator)
        sampling = self._sampling
        order = torch.sort(logits, descending=True, stable=True)
        kept = order.values if sampling.top_k is None else order.values[: sampling.top_k]
        shares = torch.softmax(kept / sampling.temperature, dim=-1)
        sums = shares.cumsum(dim=-1)
        # The first token that reaches top_p is the last of the nucleus.
        size = min(int((sums < sampling.top_p).sum()) + 1, len(sums))
        ids, nucleus = order.indices[:size], sums[:size]
        if not isinstance(sampling.seed, int):
            ids, by_id = torch.sort(ids)
            nucleus = shares[:size][by_id].cumsum(dim=-1)
        index = int(torch.searchsorted(nucleus, point * nucleus[-1], right=True))
        return int(ids[min(index, size - 1)])


def _generator(seed: int, prompt: Sequence[int], occurrence: int) -> torch.Generator:
    words = ",".join(map(str, (seed, occurrence, *prompt)))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
