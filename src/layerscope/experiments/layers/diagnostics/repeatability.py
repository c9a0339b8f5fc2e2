"""Would another arithmetic say the same? The same passes in other precisions, batches, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from layerscope.experiments.layers.diagnostics import variants
from layerscope.experiments.layers.diagnostics.material import Material, States
from layerscope.experiments.layers.diagnostics.onsets import Answers, onsets, preferred
from layerscope.experiments.layers.diagnostics.sections import (
    Section,
    Skipped,
    result,
    skipped,
)
from layerscope.lenses.norm import NormLens
from layerscope.models import LanguageModel
from layerscope.readout import Readout, Reference, Request

TOP = 10
_REQUEST = Request(
    entropy=False,
    top_k=TOP,
    gap=True,
    kl_to_reference=True,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)


def repeatability(material: Material) -> Section:
    """Repeat the passes in other ways and compare what the norm lens reads.

    Variants: bfloat16 products or float32 weights, one prompt at a time, a batch that pads every
    row, the other attention kernel. What this model or backend does not allow says why.
    """
    base = _chosen(material)
    makers: dict[str, Callable[[Material], variants.Variant]] = {
        "precision": variants.other_precision,
        "batch_of_one": variants.one_at_a_time,
        "padded_batch": variants.padded,
        "attention": variants.other_attention,
    }
    comparisons: dict[str, Section] = {}
    for name, make in makers.items():
        try:
            variant = make(material)
        except Skipped as reason:
            comparisons[name] = skipped(str(reason))
            continue
        comparisons[name] = {"status": "ok", "what": variant.what} | _compare(
            material, base, variant.states, variant.model
        )
    gates = {f"repeatability.{n}": entry.get("pass") for n, entry in comparisons.items()}
    warnings = [
        f"{name}: {entry['reason']}" if entry["status"] == "skipped" else f"{name}: {complaint}"
        for name, entry in comparisons.items()
        for complaint in entry.get("complaints", [""])
    ]
    return result(
        gates,
        thresholds=_thresholds(material),
        warnings=warnings,
        comparisons=comparisons,
        **_scope(material),
    )


def forward_of_two(material: Material) -> Section:
    """Run the very same batch a second time: the same bits, or the model is not deterministic."""
    base = _chosen(material)
    again = variants.again(material)
    found = _compare(material, base, again, None)
    same = bool(torch.equal(base.residual, again.residual)) and bool(
        torch.equal(base.logits, again.logits)
    )
    warnings = list(found["complaints"])
    if not same:
        warnings.append(
            f"two identical passes differ by up to {found['max_abs_logit_difference']:.3g} logits: "
            "the model, or its kernels, are not deterministic"
        )
    return result(
        {"repeatability_forward_pass": found["pass"], "bit_equal": same},
        thresholds=_thresholds(material),
        warnings=warnings,
        **found,
        **_scope(material),
    )


def _chosen(material: Material) -> States:
    n = len(variants.repeated(material))
    last = material.captured.last
    return States(last.residual[:n], last.logits[:n])


def _scope(material: Material) -> dict[str, Any]:
    chosen = variants.repeated(material)
    every = len(material.passes) + material.left_out
    return {
        "prompt_indices": [item.source.index for item in chosen],
        "passes_left_out": every - len(chosen),
    }


def _thresholds(material: Material) -> dict[str, Any]:
    settings = material.settings
    return {
        "rank_deviation": settings.rank_deviation,
        "flip_rate": settings.flip_rate,
        "decided_gap": settings.decided_gap,
        "milestone_shift": settings.milestone_shift,
        "jaccard_at_10": settings.jaccard,
    }


def _compare(
    material: Material, base: States, other: States, model: LanguageModel | None
) -> dict[str, Any]:
    """Measure how far another arithmetic's reading is from the run's own."""
    norm = material.norm if model is None else NormLens(model, choice=_choice(material))
    passes = variants.repeated(material)
    answers = material.answers(passes)[:, None].repeat_interleave(material.n_rows, 0)
    hidden = material.through(material.norm, base.residual).flatten(0, 1)
    ours = material.read(hidden, _REQUEST, tokens=answers)
    assert ours.top_ids is not None
    theirs = material.read(
        material.through(norm, other.residual).flatten(0, 1),
        _REQUEST,
        tokens=torch.cat([answers, ours.top_ids[:, :1].long()], dim=1),
        reference=Reference(index=torch.arange(len(hidden)), hidden=hidden),
        model=model,
    )
    return _judge(material, ours, theirs) | {
        "max_abs_logit_difference": float((base.logits - other.logits).abs().max()),
        "max_relative_residual_difference": _relative(base, other),
    }


def _choice(material: Material) -> Any:
    return material.config.norm_choice


def _relative(base: States, other: States) -> float:
    ours, theirs = base.residual.double(), other.residual.double()
    return float(((ours - theirs).norm(dim=-1) / ours.norm(dim=-1).clamp_min(1e-30)).max())


def _judge(material: Material, ours: Readout, theirs: Readout) -> dict[str, Any]:
    settings = material.settings
    assert ours.top1_top2_gap is not None and theirs.token_rank is not None
    assert ours.top_ids is not None and theirs.top_ids is not None
    assert theirs.reference is not None and theirs.reference.kl_to_bits is not None
    deviation = (theirs.token_rank[:, 1].double() - 1).abs()
    flipped = (ours.top_ids[:, 0] != theirs.top_ids[:, 0]).double()
    decided = ours.top1_top2_gap >= settings.decided_gap
    decided_flips = float(flipped[decided].mean()) if bool(decided.any()) else 0.0
    shifts = _shifts(material, ours, theirs)
    moved = [entry["shift"] for entry in shifts if entry["shift"] is not None]
    lost = [entry for entry in shifts if entry["appeared_or_vanished"]]
    overlaps = [entry["jaccard_at_10"] for entry in shifts if entry["jaccard_at_10"] is not None]
    measured = {
        "rows": len(deviation),
        "max_rank_deviation": float(deviation.max()),
        "p95_rank_deviation": float(torch.quantile(deviation, 0.95)),
        "top1_flip_rate": float(flipped.mean()),
        "decided_flip_rate": decided_flips,
        "decided_rows": int(decided.sum()),
        "max_kl_bits": float(theirs.reference.kl_to_bits.nan_to_num(nan=torch.inf).max()),
        "max_milestone_shift": max((abs(shift) for shift in moved), default=None),
        "milestones": shifts,
    }
    complaints = {
        f"a top-1 token falls to rank {1 + int(deviation.max())}": bool(
            deviation.max() > settings.rank_deviation
        ),
        f"{decided_flips:.1%} of decided top-1 tokens change": decided_flips > settings.flip_rate,
        f"a milestone moves by {max(map(abs, moved), default=0)} rows": any(
            abs(shift) > settings.milestone_shift for shift in moved
        ),
        f"a milestone appears or vanishes in {len(lost)} passes": bool(lost),
        f"at a milestone only {min(overlaps, default=1.0):.0%} of the ten most likely tokens "
        "are the same": any(overlap < settings.jaccard for overlap in overlaps),
        "NaN or infinity in the repeated reading": bool((theirs.nonfinite & ~ours.nonfinite).any()),
    }
    found = [line for line, holds in complaints.items() if holds]
    return measured | {"pass": not found, "complaints": found}


def _shifts(material: Material, ours: Readout, theirs: Readout) -> list[dict[str, Any]]:
    """Compare the preferred milestone of every pass: the same one, in both readings."""
    n_rows = material.n_rows
    assert ours.top_ids is not None and theirs.top_ids is not None
    entries: list[dict[str, Any]] = []
    for number, item in enumerate(variants.repeated(material)):
        rows = slice(number * n_rows, (number + 1) * n_rows)
        first, second = (
            onsets(_answers(reading, rows), material.config.measures, material.model.d_vocab)
            for reading in (ours, theirs)
        )
        chosen = preferred(first)
        name = chosen[0] if chosen else (preferred(second) or ("L_semantic", 0))[0]
        before, after = first[name], second[name]
        overlap = None
        if before is not None:
            at = rows.start + before
            overlap = _jaccard(ours.top_ids[at].tolist(), theirs.top_ids[at].tolist())
        entries.append(
            {
                **material.describe(item),
                "milestone": name,
                "layer": before,
                "layer_repeated": after,
                "shift": None if before is None or after is None else after - before,
                "appeared_or_vanished": (before is None) != (after is None),
                "jaccard_at_10": overlap,
            }
        )
    return entries


def _answers(reading: Readout, rows: slice) -> Answers:
    assert reading.token_rank is not None and reading.token_log2p is not None
    assert reading.top1_top2_gap is not None and reading.top_ids is not None
    rank = reading.token_rank[rows, 0].numpy()
    lead = np.where(rank == 1, reading.top1_top2_gap[rows].numpy(), np.nan)
    return Answers(rank, reading.token_log2p[rows, 0].double().exp2().numpy(), lead)


def _jaccard(ours: list[int], theirs: list[int]) -> float:
    both = len(set(ours) & set(theirs))
    return both / (len(set(ours)) + len(set(theirs)) - both)
