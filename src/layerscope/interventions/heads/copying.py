"""Whether a head writes the token that it reads: its value-output circuit, on real values.

For each token of the sequences, the head's value there is written out by its rows of the output
matrix and read by the unembedding (through the gain of the final norm, which shows how coordinates
are weighted). Elhage et al. (2021) judge such a circuit by its eigenvalues.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.heads.sequences import Repeated, tokens_of
from layerscope.interventions.stream import freeze_norm
from layerscope.models import Capture, LanguageModel, Replace, Site, TokenBatch


def copying_scores(
    model: LanguageModel, repeated: Repeated
) -> dict[str, Float[Tensor, "layer head"]]:
    """Return two scores of every head.

    ``copying``: sum of the eigenvalues of its token-to-logit circuit over the sum of their sizes,
    from -1 (suppresses what it reads) to 1 (copies it), estimated on the tokens of the sequences.
    ``own_token_first``: the share of tokens whose own logit the head raises most among the tokens
    of its sequence; 1 / length by chance.

    Raises:
        CapabilityError: values or heads cannot be read, or a head's output is not a mixture of its
            values.
    """
    tokens = tokens_of(repeated)
    columns = list(range(repeated.front, repeated.front + repeated.length))
    layers = range(model.n_layers)
    last = Site("resid_post", model.n_layers - 1)
    sites = [*(Site("attn.v", layer) for layer in layers), last, Site("final_norm")]
    for site in sites:
        reason = model.backend.why_not(site)
        if reason is not None:
            raise CapabilityError(reason)
    run = model.run(repeated.batch, capture=Capture(sites, positions=columns), logits=None)
    name, norm = model.norm_at(model.n_layers, "final")
    rows = run[last].flatten(0, 1), run[Site("final_norm")].flatten(0, 1)
    frozen = freeze_norm(norm, *rows, model.dtype, name)
    weight = model.unembedding.weight.detach()
    read = weight[tokens.flatten().to(weight.device)].cpu().double() * frozen.gain
    if frozen.centred:
        read = read - read.mean(-1, keepdim=True)
    read = read.view(*tokens.shape, -1)
    found = torch.full((2, model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    for layer in layers:
        out = output_matrices(model, layer)
        values = run[Site("attn.v", layer)].detach().cpu().double()
        values = values.repeat_interleave(model.n_heads // values.shape[2], dim=2)
        if values.shape[-1] != out.shape[1]:
            raise CapabilityError(
                f"heads of block {layer} write {out.shape[1]} numbers and read "
                f"{values.shape[-1]}: they are not mixtures of their values"
            )
        for head in range(model.n_heads):
            found[:, layer, head] = _scores(values[:, :, head], read @ out[head].T, tokens)
    return {"copying": found[0], "own_token_first": found[1]}


def output_matrices(model: LanguageModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Return every head's rows of the output matrix, read off by writing unit vectors to z."""
    site = Site("attn.z", layer)
    n_heads, width = model.backend.trailing(site, 1)
    ids = torch.zeros(width, 1, dtype=torch.long)
    batch = TokenBatch.from_tensors(ids, torch.ones_like(ids))
    units = torch.eye(width, dtype=model.dtype, device=model.device)
    value = units[:, None, None].expand(-1, 1, n_heads, -1)
    outs = [Site("attn.out", layer, head) for head in range(n_heads)]
    result = model.run(
        batch, edits=[Replace(site, value)], capture=outs, stop_after=layer, logits=None
    )
    return torch.stack([result[out][:, 0].detach().cpu().double() for out in outs])


def _scores(
    values: Float[Tensor, "row token d_head"],
    read: Float[Tensor, "row token d_head"],
    tokens: Int[Tensor, "row token"],
) -> Float[Tensor, " score"]:
    """Return the eigenvalue score and the share of tokens that raise their own logit most.

    The circuit ``sum over tokens of value ⊗ reading`` is [d_head, d_head]; it has the same nonzero
    eigenvalues as the [token, token] matrix of what every token's value adds to every logit.
    """
    flat_values, flat_read = values.flatten(0, 1), read.flatten(0, 1)
    flat_values, flat_read = flat_values - flat_values.mean(0), flat_read - flat_read.mean(0)
    eigenvalues = torch.linalg.eigvals(flat_values.T @ flat_read)
    sizes = float(eigenvalues.abs().sum())
    copying = float(eigenvalues.real.sum()) / sizes if sizes else torch.nan
    logits = values @ read.transpose(-1, -2)
    # Against what every token's logit gets from whatever the head reads.
    logits = logits - logits.mean(1, keepdim=True)
    own = torch.arange(tokens.shape[1])
    first = (logits.argmax(-1) == own).double().mean() if sizes else torch.tensor(torch.nan)
    return torch.stack([torch.tensor(copying, dtype=torch.float64), first.double()])
