"""AtP*: the softmax computed again for queries and keys, and gradients dropped layer by layer.

Kramár, Lieberum, Shah, Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour
to components", arXiv 2403.00745 (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.nodes import (
    NodeScores,
    at_real_tokens,
    per_unit,
    resolve_sites,
)
from layerscope.models import Apply, Edit, LanguageModel, Replace, Site

_SINK = 1e-2  # rows of a pattern that lack more than this have a sink


def atp_star(
    contrast: Contrast, sites: str | Sequence[str] = "heads", *, grad_drop: bool = True
) -> NodeScores:
    """Score nodes as AtP* does.

    Queries and keys are scored by what their exchange does to the attention pattern, exactly, times
    the gradient at the pattern. With `grad_drop` a score is the mean size over passes that drop the
    gradient through one block each, so that direct and indirect effects of opposite sign do not
    hide a node; such scores have no sign.

    Raises:
        CapabilityError: queries or keys were asked of a model whose scores are not to be seen, or
            whose attention has sinks.
    """
    chosen = resolve_sites(contrast.model, sites)
    moves = _moves(contrast, chosen)
    if not grad_drop:
        values = _scores(contrast, chosen, moves, ())
        return NodeScores("AtP* without GradDrop", contrast, values)
    n_layers = contrast.model.n_layers
    total: dict[Site, Tensor] = {}
    for layer in range(n_layers):
        dropped = _scores(contrast, chosen, moves, _dropped(contrast.model, layer))
        for site, values in dropped.items():
            known = total.get(site)
            total[site] = values.abs() if known is None else known + values.abs()
    share = 1 / max(1, n_layers - 1)
    return NodeScores("AtP*", contrast, {site: value * share for site, value in total.items()})


@dataclass(frozen=True, eq=False)
class SaturatedHead:
    """A head whose softmax bends what its scores say.

    Attributes:
        whole: effect of the pattern's true change on the metric, other things linear.
        linear: the same as its scores' change predicts it through the softmax's gradient.
    """

    layer: int
    head: int
    whole: float
    linear: float


def saturated_heads(
    contrast: Contrast, *, least: float = 0.05, blind: float = 0.25
) -> list[SaturatedHead]:
    """Name heads in which gradients do not see what a changed pattern does.

    Args:
        contrast: what is asked.
        least: smallest effect through a pattern that counts, as a share of the whole effect.
        blind: largest share of it that the linear prediction may see, for a head to be named.
    """
    model = contrast.model
    kinds = ("attn.scores", "attn.pattern")
    layers = [
        layer
        for layer in range(model.n_layers)
        if all(model.backend.why_not(Site(kind, layer)) is None for kind in kinds)
    ]
    patterns = [Site("attn.pattern", layer) for layer in layers]
    base = contrast.gradients(patterns)
    both = [site for layer in layers for site in (Site(kinds[0], layer), Site(kinds[1], layer))]
    donor, kept = contrast.values("donor", both), contrast.values("base", both)
    total = float(contrast.total.mean())
    real = contrast.base.attention_mask[:, None, :, None]
    found: list[SaturatedHead] = []
    for layer, site in zip(layers, patterns, strict=True):
        scores = Site("attn.scores", layer)
        weights = _wide(base.gradients[site]).masked_fill(~real.to(base.metric.device), 0.0)
        p = _wide(kept[site])
        moved = torch.nan_to_num(_wide(donor[scores]) - _wide(kept[scores]), nan=0.0)
        slope = p * (moved - (p * moved).sum(-1, keepdim=True))
        whole = ((_wide(donor[site]) - p) * weights).sum((-1, -2)).mean(0)
        linear = (slope * weights).sum((-1, -2)).mean(0)
        for head in range(len(whole)):
            true, seen = float(whole[head]), float(linear[head])
            if abs(true) >= least * abs(total) and not blind * abs(true) <= seen * _sign(true):
                found.append(SaturatedHead(layer, head, true, seen))
    return sorted(found, key=lambda head: -abs(head.whole))


def _sign(value: float) -> int:
    return -1 if value < 0 else 1


def _dropped(model: LanguageModel, layer: int) -> list[Edit]:
    """Return edits that keep a block's values and cut its gradient."""
    sites = (Site("attn_out", layer), Site("mlp_out", layer))
    return [Apply(site, lambda value, _: value.detach()) for site in sites]


@dataclass(frozen=True, eq=False)
class _Move:
    """What exchanging queries or keys does to a block's pattern, one position at a time.

    Attributes:
        site: of the queries or keys. pattern: whose gradient is needed.
        change: of the pattern (queries), or of the weight of each key alone (keys).
        base: the pattern before.
    """

    site: Site
    pattern: Site
    change: Float[Tensor, "row head query key"]
    base: Float[Tensor, "row head query key"]


def _moves(contrast: Contrast, sites: Sequence[Site]) -> dict[Site, _Move]:
    found: dict[Site, _Move] = {}
    for site in sites:
        if site.kind not in ("attn.q", "attn.k"):
            continue
        assert site.layer is not None
        scores, pattern = Site("attn.scores", site.layer), Site("attn.pattern", site.layer)
        base = contrast.values("base", [scores, pattern])
        donor = contrast.values("donor", [site])[site]
        run = contrast.model.run(
            contrast.base,
            edits=[Replace(site, donor)],
            capture=[scores, pattern],
            stop_after=site.layer,
            logits=None,
        )
        p = _wide(base[pattern])
        if site.kind == "attn.q":
            change = _wide(run[pattern]) - p
        else:
            mask = contrast.base.attention_mask.to(p.device)
            _require_no_sink(contrast, p, mask)
            before = _wide(base[scores])
            change = _alone(before, _wide(run[scores])) - _alone(before, before)
        found[site] = _Move(site, pattern, change, p)
    return found


def _alone(
    base: Float[Tensor, "row head query key"], changed: Float[Tensor, "row head query key"]
) -> Float[Tensor, "row head query key"]:
    """Return every key's weight when its score alone is the changed one."""
    others = torch.logsumexp(base, -1, keepdim=True)
    share = (base - others).exp()
    # log(sum of all others): exact by subtraction where the key has little weight, ...
    rest = others + torch.log1p(-share.clamp_max(0.5))
    # ... and by a sum without it where it has much.
    top = share.argmax(-1, keepdim=True)
    without = torch.logsumexp(base.scatter(-1, top, -torch.inf), -1, keepdim=True)
    rest = rest.scatter(-1, top, without)
    return torch.nan_to_num(torch.sigmoid(changed - rest), nan=0.0)


def _scores(
    contrast: Contrast, sites: Sequence[Site], moves: dict[Site, _Move], edits: Sequence[Edit]
) -> dict[Site, Float[Tensor, "row pos unit"]]:
    plain = [site for site in sites if site not in moves]
    shown = [move.pattern for move in moves.values()]
    run = contrast.gradients([*dict.fromkeys([*plain, *shown])], edits=edits)
    donor = contrast.values("donor", plain) if plain else {}
    found: dict[Site, Tensor] = {}
    for site in sites:
        move = moves.get(site)
        if move is None:
            change = _wide(donor[site]) - _wide(run.values[site])
            found[site] = per_unit(site, change * _wide(run.gradients[site]))
        else:
            found[site] = _pattern_scores(contrast, move, _wide(run.gradients[move.pattern]))
        found[site] = at_real_tokens(found[site], contrast.base)
    return found


def _pattern_scores(
    contrast: Contrast, move: _Move, gradient: Float[Tensor, "row head query key"]
) -> Float[Tensor, "row pos unit"]:
    real = contrast.base.attention_mask[:, None, :, None].to(gradient.device)
    gradient = gradient.masked_fill(~real, 0.0)
    if move.site.kind == "attn.q":
        return (move.change * gradient).sum(-1).transpose(1, 2)
    # The others share what the key gives up: their mean gradient, weighted as before without it.
    p = move.base
    mean = (p * gradient).sum(-1, keepdim=True)
    left = 1 - p
    others = (mean - p * gradient) / left
    top = p.argmax(-1, keepdim=True)
    without = p.scatter(-1, top, 0.0)
    exact = (without * gradient).sum(-1, keepdim=True) / without.sum(-1, keepdim=True)
    others = others.scatter(-1, top, torch.nan_to_num(exact, nan=0.0))
    effect = torch.where(move.change == 0, 0.0, move.change * (gradient - others))
    by_key = effect.sum(2).transpose(1, 2)  # [row, key, head]
    n_kv_heads = contrast.model.n_kv_heads
    return by_key.unflatten(-1, (n_kv_heads, -1)).sum(-1)


def _require_no_sink(contrast: Contrast, pattern: Tensor, mask: Tensor) -> None:
    total = pattern.sum(-1).transpose(1, 2)[mask]
    if bool((total < 1 - _SINK).any()):
        raise CapabilityError(
            f"attention in {contrast.model.name} has sinks, which the recomputed softmax of single "
            "keys leaves out; score queries, values or heads instead"
        )


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
