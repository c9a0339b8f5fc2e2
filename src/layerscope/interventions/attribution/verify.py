"""How far a prediction can be believed: its strongest nodes, and a sample of the others, for real.

What is verified is patched exactly. The report counts wrong signs and ranks, bounds how many strong
nodes the prediction missed, and says why where it can: a saturated metric, saturated attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError, ConfigError
from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.exact import exact_effects, joint_effect
from layerscope.interventions.attribution.nodes import Node, NodeScores
from layerscope.interventions.attribution.star import saturated_heads

MATTERS = 0.05
"""Share of the whole effect from which on a node matters."""
BLIND = 0.1
"""Share of its exact effect below which a prediction has not seen a node."""


@dataclass(frozen=True)
class Verified:
    """One node (or its name): predicted and exact mean effect, and whether predicted strong."""

    node: Node | str
    predicted: float
    exact: float
    top: bool


@dataclass(frozen=True)
class Verification:
    """Prediction against exact patching.

    Attributes:
        method: of the prediction.
        nodes: what was verified: the strongest by prediction, then a random sample of the others.
        total: mean effect of changing everything.
        n_others: nodes that were not among the strongest.
        spearman: rank correlation of predicted and exact sizes; None for fewer than three nodes,
            or where all are alike.
        wrong_signs: nodes that matter and whose sign is wrong.
        blind: nodes that matter and were not seen.
        unconfirmed: nodes that were predicted to matter and do nothing: others make up for them.
        missed: sampled nodes stronger than the weakest of the strongest, for real.
        missed_bound: with 95% confidence at most this share of the nodes outside the strongest is
            stronger than the weakest of them; None without a sample.
        joint: mean effect of the strongest exchanged together; None without any.
        warnings: one line each.
    """

    method: str
    nodes: tuple[Verified, ...]
    total: float
    n_others: int
    spearman: float | None
    wrong_signs: tuple[Node | str, ...]
    blind: tuple[Node | str, ...]
    unconfirmed: tuple[Node | str, ...]
    missed: tuple[Node | str, ...]
    missed_bound: float | None
    joint: float | None
    warnings: tuple[str, ...]

    def table(self) -> pl.DataFrame:
        """Return one row per verified node: ``node, predicted, exact, top, seen``."""
        rows = [
            {
                "node": str(item.node),
                "predicted": item.predicted,
                "exact": item.exact,
                "top": item.top,
                "seen": item.node not in self.blind,
            }
            for item in self.nodes
        ]
        schema = {
            "node": pl.String,
            "predicted": pl.Float64,
            "exact": pl.Float64,
            "top": pl.Boolean,
            "seen": pl.Boolean,
        }
        return pl.DataFrame(rows, schema=schema)


def verify(
    scores: NodeScores,
    *,
    top: int = 10,
    sample: int = 20,
    seed: int = 0,
    positions: bool = False,
    unsigned: bool = False,
) -> Verification:
    """Patch the strongest nodes and a random sample of the others exactly, and compare.

    Args:
        scores: the prediction.
        top: how many of the strongest. sample: how many of the others.
        seed: of the sample.
        positions: verify nodes at single positions instead of at all of them together.
        unsigned: the prediction has no sign (AtP* with GradDrop).

    Raises:
        ConfigError: nothing is to be verified.
    """
    strongest, sampled, n_others = pick(
        scores.ranked(positions=positions), top=top, sample=sample, seed=seed
    )
    exact = exact_effects(scores.contrast, [*strongest, *sampled])
    nodes = [
        Verified(node, scores.mean(node), float(exact[node].mean()), node in strongest)
        for node in [*strongest, *sampled]
    ]
    joint = float(joint_effect(scores.contrast, strongest).mean()) if strongest else None
    total = float(scores.contrast.total.mean())
    return judge(
        scores.method,
        nodes,
        total,
        joint,
        n_others=n_others,
        unsigned=unsigned,
        reason=lambda: blind_reason(scores.contrast),
    )


def pick(
    ranked: Sequence[Node], *, top: int, sample: int, seed: int
) -> tuple[list[Node], list[Node], int]:
    """Return the strongest nodes, a random sample of the others, and how many others there are.

    Raises:
        ConfigError: that is nothing at all.
    """
    if top < 0 or sample < 0 or not ranked[: top + sample]:
        raise ConfigError("nothing is to be verified; give top or sample")
    strongest, others = list(ranked[:top]), ranked[top:]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(others), generator=generator)[:sample].tolist()
    return strongest, [others[index] for index in sorted(drawn)], len(others)


def judge(
    method: str,
    nodes: Sequence[Verified],
    total: float,
    joint: float | None,
    *,
    n_others: int,
    unsigned: bool = False,
    reason: Callable[[], str] = lambda: "gradients are far from the effect",
) -> Verification:
    """Compare predictions with exact effects.

    Args:
        method: of the prediction.
        nodes: what was verified.
        total: mean effect of changing everything.
        joint: mean effect of the strongest together.
        n_others: nodes outside the strongest.
        unsigned: the prediction has no sign.
        reason: says why gradients are blind; asked only if they are.
    """
    found = _Findings.of(nodes, MATTERS * abs(total), unsigned=unsigned)
    drawn = sum(not item.top for item in nodes)
    return Verification(
        method=method,
        nodes=tuple(nodes),
        total=total,
        n_others=n_others,
        spearman=_spearman([abs(v.predicted) for v in nodes], [abs(v.exact) for v in nodes]),
        wrong_signs=tuple(item.node for item in found.wrong_signs),
        blind=tuple(item.node for item in found.blind),
        unconfirmed=tuple(item.node for item in found.unconfirmed),
        missed=tuple(item.node for item in found.missed),
        missed_bound=_upper_bound(len(found.missed), drawn) if drawn else None,
        joint=joint,
        warnings=tuple(_warnings(total, found, nodes, joint, reason)),
    )


@dataclass(frozen=True)
class _Findings:
    """Verified nodes by what is wrong with their prediction."""

    blind: tuple[Verified, ...]
    wrong_signs: tuple[Verified, ...]
    unconfirmed: tuple[Verified, ...]
    missed: tuple[Verified, ...]

    @classmethod
    def of(cls, nodes: Sequence[Verified], least: float, *, unsigned: bool) -> _Findings:
        matter = [item for item in nodes if abs(item.exact) >= least > 0]
        blind = [item for item in matter if abs(item.predicted) < BLIND * abs(item.exact)]
        signs = [item for item in matter if item.predicted * item.exact < 0 and item not in blind]
        nothing = [
            item
            for item in nodes
            if abs(item.predicted) >= least > 0 and abs(item.exact) < BLIND * abs(item.predicted)
        ]
        weakest = min((abs(item.exact) for item in nodes if item.top), default=0.0)
        missed = [item for item in nodes if not item.top and abs(item.exact) > max(weakest, least)]
        return cls(tuple(blind), () if unsigned else tuple(signs), tuple(nothing), tuple(missed))


def metric_linearity(contrast: Contrast) -> float | None:
    """Return what the metric's gradient predicts of its change, from the logits' true change.

    1 for a linear metric, near 0 for one that is saturated; None where the whole effect is zero.
    """
    runs = [contrast.model.run(batch, logits="last") for batch in (contrast.base, contrast.donor)]
    logits = [run.logits[:, -1].detach() for run in runs if run.logits is not None]
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    base = logits[0].to(wide).requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(contrast.metric(base).sum(), base)
    moved = logits[1].to(wide) - base.detach()
    # Whatever the gradient ignores may be infinite (a masked vocabulary).
    seen = torch.where(gradient == 0, 0.0, gradient * moved).sum(-1)
    total = float(contrast.total.mean())
    return float(seen.mean()) / total if total else None


def _warnings(
    total: float,
    found: _Findings,
    nodes: Sequence[Verified],
    joint: float | None,
    reason: Callable[[], str],
) -> list[str]:
    lines: list[str] = []
    if not total:
        lines.append("clean and corrupt prompts give the same metric: nothing can be attributed")
    if found.blind:
        names = ", ".join(f"{item.node} (exact {item.exact:.3g})" for item in found.blind[:5])
        lines.append(f"blind: {reason()}: gradients do not see {names}")
    if found.wrong_signs:
        lines.append(f"wrong sign: {_pairs(found.wrong_signs)}")
    if found.unconfirmed:
        lines.append(
            f"not confirmed: {_pairs(found.unconfirmed)}; something later makes up for them (a "
            "backup), so look at their direct effects"
        )
    single = sum(abs(item.exact) for item in nodes if item.top)
    if joint is not None and single < 0.5 * abs(joint) >= 0.5 * MATTERS:
        lines.append(
            f"redundant: the strongest do {joint:.3g} together and {single:.3g} in all one by one, "
            "so patches of single nodes miss them (an OR of parts); patch sets, or denoise"
        )
    if found.missed:
        names = ", ".join(str(item.node) for item in found.missed[:5])
        lines.append(
            f"missed: {names} are stronger than some of the strongest by prediction; verify more "
            "of them, or integrate along a path"
        )
    return lines


def _pairs(items: Sequence[Verified]) -> str:
    return ", ".join(
        f"{item.node} (predicted {item.predicted:.2g}, exact {item.exact:.2g})"
        for item in items[:5]
    )


def blind_reason(contrast: Contrast) -> str:
    """Return why gradients may be blind here: a saturated metric, saturated attention, or other."""
    linearity = metric_linearity(contrast)
    if linearity is not None and abs(linearity) < 0.5:
        return (
            f"saturated metric (its gradient sees {linearity:.1%} of its change; use logits rather "
            "than probabilities)"
        )
    try:
        heads = saturated_heads(contrast)
    except CapabilityError:
        heads = []
    if heads:
        names = ", ".join(f"attn.{head.layer}.head.{head.head}" for head in heads[:3])
        return f"saturated attention in {names} (score edges with qk='recomputed')"
    return "the path from the node to the metric is far from linear"


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 3:
        return None
    ranks = torch.stack([_ranks(first), _ranks(second)])
    if bool((ranks.std(1) == 0).any()):
        return None
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> Float[Tensor, " value"]:
    """Return ranks from 0, those that tie sharing their mean."""
    given = torch.tensor(values, dtype=torch.float64)
    below = (given[:, None] > given).sum(1)
    ties = (given[:, None] == given).sum(1)
    return below.double() + (ties.double() - 1) / 2


def _upper_bound(found: int, drawn: int, level: float = 0.05) -> float:
    """Return the upper end of a one-sided Clopper-Pearson interval for a share."""
    if found >= drawn:
        return 1.0
    low, high = found / drawn, 1.0
    for _ in range(60):
        share = (low + high) / 2
        terms = torch.distributions.Binomial(drawn, torch.tensor(share, dtype=torch.float64))
        counts = torch.arange(found + 1, dtype=torch.float64)
        tail = float(terms.log_prob(counts).exp().sum())
        low, high = (share, high) if tail > level else (low, share)
    return high
