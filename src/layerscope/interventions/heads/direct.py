"""What each head itself writes towards the token to copy: its direct share, not its effect."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.heads.sequences import Repeated, parts_of, tokens_of
from layerscope.interventions.stream import (
    Writer,
    block_writings,
    freeze_norm,
    has_heads,
    sites_of,
)
from layerscope.models import Capture, LanguageModel, Site

ROWS = 2
"""Sequences of one pass: what every head of a model writes is kept at once."""


def direct_scores(model: LanguageModel, repeated: Repeated) -> Float[Tensor, "layer head"]:
    """Return what each head adds to the right token's logit, less its sequence's mean, in logits.

    The mean is over the places whose next token has come before, with the final norm held at the
    scale that it has there. NaN in a block whose attention does not come apart into heads.

    Raises:
        CapabilityError: no block's does, or the final norm cannot be held fixed.
    """
    layers = [layer for layer in range(model.n_layers) if has_heads(model, layer)]
    if not layers:
        raise CapabilityError(str(model.backend.why_not(Site("attn.out", 0, 0))))
    scores = torch.full((model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    scores[layers] = 0.0
    last, normed = Site("resid_post", model.n_layers - 1), Site("final_norm")
    sites = [last, normed, *(site for layer in layers for site in sites_of(model, layer))]
    places = list(repeated.predicted)
    name, norm = model.norm_at(model.n_layers, "final")
    for part in parts_of(repeated, ROWS):
        run = model.run(part.batch, capture=Capture(sites, positions=places), logits=None)
        tokens = tokens_of(part)
        weight = model.unembedding.weight.detach()
        rows = weight[tokens.to(weight.device)].cpu().double() * model.unembedding.scale
        read = (rows - rows.mean(1, keepdim=True))[:, 1:]  # the token that follows each place
        frozen = freeze_norm(
            norm, run[last].flatten(0, 1), run[normed].flatten(0, 1), model.dtype, name
        )
        direction = frozen.pull(read.flatten(0, 1)).view_as(read)
        share = len(part.batch) / len(repeated.batch)
        for layer in layers:
            written = block_writings(model, layer, run.activations)
            for head in range(model.n_heads):
                value = written[Writer(layer, "head", head)].detach().cpu().double()
                scores[layer, head] += share * (value * direction).sum(-1).mean()
    return scores
