"""layerscope's own contenders, called the way a user would call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.peers.inputs import TOP_K, token_ids
from layerscope.lenses import get_lens
from layerscope.models import LanguageModel, load
from layerscope.readout import Reference, Request, TokenSets, readout

Products = Literal["default", "checked"]


def model_and_ids(folder: str, tokens: int) -> tuple[LanguageModel, list[list[int]]]:
    model = load(folder)
    return model, token_ids(model.d_vocab, tokens).tolist()


def forward(folder: str, tokens: int) -> Callable[[], Any]:
    model, ids = model_and_ids(folder, tokens)
    return lambda: model.run(ids).logits


def capture(folder: str, tokens: int) -> Callable[[], Any]:
    model, ids = model_and_ids(folder, tokens)
    return lambda: model.run(ids, capture=["resid_pre.0", "resid_post.*"])


def lens(products: Products) -> Callable[[str, int], Callable[[], Any]]:
    """All layers and positions with every statistic; more than any peer's lens computes."""

    def build(folder: str, tokens: int) -> Callable[[], Any]:
        model, ids = model_and_ids(folder, tokens)
        norm = get_lens("norm", model)
        n_rows = model.n_layers
        index = (n_rows - 1) * tokens + torch.arange(tokens).repeat(n_rows)
        answers = torch.full((n_rows * tokens, 1), 17)
        prompt_sets = TokenSets.of([ids[0]], torch.zeros(n_rows * tokens, 1, dtype=torch.long))
        sites = [f"resid_post.{layer}" for layer in range(n_rows)]

        def run() -> torch.Tensor:
            result = model.run(ids, capture=sites, logits=None, products=products)
            hidden = [norm.transform(result[site][0], row + 1) for row, site in enumerate(sites)]
            stats = readout(
                torch.cat(hidden),
                model.unembedding,
                request=Request(top_k=TOP_K),
                reference=Reference(index=index),
                tokens=answers,
                token_sets=prompt_sets,
                products=products,
            )
            assert stats.entropy_bits is not None
            return stats.entropy_bits.view(n_rows, tokens)

        return run

    return build


def last(products: Products) -> Callable[[str, int], Callable[[], Any]]:
    """All rows of the last position with every statistic, from stored residuals."""

    def build(folder: str, tokens: int) -> Callable[[], Any]:
        model, ids = model_and_ids(folder, tokens)
        norm = get_lens("norm", model)
        sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
        result = model.run(ids, capture=sites, positions=[-1], logits=None)
        states = [result[site][0] for site in sites]
        index = torch.full((len(sites),), len(sites) - 1)

        def run() -> torch.Tensor:
            hidden = [norm.transform(state, row) for row, state in enumerate(states)]
            stats = readout(
                torch.cat(hidden),
                model.unembedding,
                request=Request(top_k=TOP_K),
                reference=Reference(index=index),
                products=products,
            )
            assert stats.entropy_bits is not None
            return stats.entropy_bits

        return run

    return build


CONTENDERS: dict[str, Callable[[str, int], Callable[[], Any]]] = {
    "layerscope:forward": forward,
    "layerscope:capture": capture,
    "layerscope:lens": lens("default"),
    "layerscope:lens-checked": lens("checked"),
    "layerscope:last": last("default"),
    "layerscope:last-checked": last("checked"),
}
