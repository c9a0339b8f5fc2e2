"""Tiny models behind the public interface, built once per process, and how to tell they changed."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import nn

import layerscope
from layerscope.models import LanguageModel, TokenBatch
from support.tiny_models import FAMILIES, UNLISTED, tiny, tiny_tokenizer

LISTED = tuple(FAMILIES)
EVERY = (*FAMILIES, *UNLISTED)

# Three prompts of different lengths, longer than every tiny sliding window.
SEQUENCES = (
    (1, 17, 40, 5, 300, 251, 8, 90, 33),
    (1, 99, 180, 7, 12),
    (1, 44, 3, 260, 77, 101, 18),
)


@cache
def loaded(family: str) -> LanguageModel:
    """Return the tiny model of a family; shared, so leave it as you found it."""
    return layerscope.load(tiny(family), tokenizer=tiny_tokenizer())


def hf(model: LanguageModel) -> nn.Module:
    """Return the Hugging Face model behind a `LanguageModel`."""
    return model.backend.model  # type: ignore[attr-defined]


def batch_of(*rows: int, side: str = "right") -> TokenBatch:
    """Return a batch of some of SEQUENCES; all of them by default."""
    chosen = [SEQUENCES[row] for row in rows] or SEQUENCES
    return TokenBatch.from_ids(chosen, padding_side=side)


def state_of(model: nn.Module) -> str:
    """Return a digest of everything a run must leave alone: weights, buffers, hooks, forwards."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(str(tensor.grad is None).encode())
    for name, module in model.named_modules():
        hooks = [
            sorted(map(id, table.values()))
            for table in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
            )
        ]
        digest.update(f"{name} {hooks} {'forward' in module.__dict__} {module.training}".encode())
    return digest.hexdigest()


def real(tensor: torch.Tensor, batch: TokenBatch, row: int) -> torch.Tensor:
    """Return one row of a padded result without its padding."""
    return tensor[row][batch.attention_mask[row]]
