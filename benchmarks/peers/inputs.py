"""The same input for every contender."""

from __future__ import annotations

import torch

TOP_K = 10


def token_ids(vocab: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (1, tokens), generator=generator)
    ids[:, 0] = 1
    return ids
