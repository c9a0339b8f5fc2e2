"""Would another arithmetic say the same? The same passes in other precisions, batches, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerscope.experiments.layers.diagnostics import variants
from layerscope.experiments.layers.diagnostics.material import Material, States
from layerscope.experiments.layers.diagnostics.onsets import Answers, onsets, preferred
from layerscope.experiments.layers.diagnostics.sections import (
    Section,
    Skipped,
    all_hold,
    result,
)
from layerscope.lenses.norm import NormLens
from layerscope.measures import repeatability as measure
from layerscope.models import LanguageModel
from layerscope.readout import Readout, Reference, Request

_REQUEST = Request(
    entropy=False,
    top_k=measure.TOP_K,
    gap=True,
    kl_to_reference=True,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)
MAKERS: dict[str, Callable[[Material], variants.Variant]] = {
    "second_pass": variants.again,
    "precision": variants.other_precision,
    "batch_of_one": variants.one_at_a_time,
    "padded_batch": variants.padded,
    "attention": variants.other_attention,
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """The run's own reading of some passes, and that of another arithmetic.

    `theirs` looks up two tokens per row: the answer, and what the run's own reading put first.
    """

    what: str
    base: States
    other: States
    ours: Readout
    theirs: Readout


@dataclass(frozen=True, eq=False)
class Comparisons:
    """All variants that this model allows, and why the others are missing."""

    made: dict[str, Comparison]
    missing: dict[str, str]


def compare_all(material: Material) -> Comparisons:
    """Run every variant once, for both sections."""
    made: dict[str, Comparison] = {}
    missing: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            made[name] = _compare(material, make(material))
        except Skipped as reason:
            missing[name] = str(reason)
    return Comparisons(made, missing)


def repeatability(material: Material) -> Section:
    """Say how far top-1 tokens move when the arithmetic changes.

    Conditions: the same pass again, bfloat16 products or float32 weights, one prompt at a time, a
    batch that pads every row, the other attention kernel; all rows of the norm lens. A gate fails
    where more than 2% of the decided top-1 tokens (leading by half a logit) change, or one falls
    below rank 6.
    """
    found = material.once("comparisons", compare_all)
    config, settings = material.config.measures, material.settings
    readings = [
        measure.Reading(
            condition=name,
            milestone=None,
            layer=None,
            top_ids={},
            reference_top1_ranks=_ranks(entry).tolist(),
        )
        for name, entry in found.made.items()
    ]
    section = measure.repeatability(readings, config)
    gates: dict[str, bool | None] = dict.fromkeys(
        (f"repeatable.{name}" for name in found.missing), None
    )
    warnings = [f"{name} was not compared: {why}" for name, why in found.missing.items()]
    for entry in section["conditions"]:
        comparison = found.made[entry["condition"]]
        entry |= {"what": comparison.what} | _decided(comparison, settings.decided_gap)
        complaints = _complaints(entry, config.repeat_rank_dev, config.repeat_flip_rate)
        entry["gate"] = not complaints
        gates[f"repeatable.{entry['condition']}"] = entry["gate"]
        warnings += [f"{entry['what']}: {line}" for line in complaints]
    return result(
        gates,
        thresholds={
            "rank_deviation": config.repeat_rank_dev,
            "flip_rate": config.repeat_flip_rate,
            "decided_gap": settings.decided_gap,
        },
        warnings=warnings,
        **section,
        not_compared=found.missing,
        **_scope(material),
    )


def repeatability_forward(material: Material) -> Section:
    """Say whether every pass keeps its milestone when it is run again, alike and otherwise.

    The two identical passes must give the same bits; under every condition the preferred milestone
    must stay the same one, within a row, with half of the ten most likely tokens there.
    """
    found = material.once("comparisons", compare_all)
    per_pass: list[dict[str, Any]] = []
    for number, item in enumerate(variants.repeated(material)):
        own = _reading(material, "run", next(iter(found.made.values())).ours, number)
        others = [
            _reading(material, name, entry.theirs, number) for name, entry in found.made.items()
        ]
        section = measure.repeatability_forward(own, others, material.config.measures)
        per_pass.append({**material.describe(item), **section})
    second = found.made["second_pass"]
    same = bool(torch.equal(second.base.residual, second.other.residual)) and bool(
        torch.equal(second.base.logits, second.other.logits)
    )
    verdict = all_hold([entry["gate"]["repeatability_forward_pass"] for entry in per_pass])
    warnings = [
        f"{entry['fact_key']}: {condition['condition']} moves {entry['milestones']['primary']} "
        f"from row {entry['milestones']['pass1']['layer']} to {condition['layer']}"
        for entry in per_pass
        for condition in entry["conditions"]
        if condition["pass"] is False
    ]
    if not same:
        difference = float((second.base.logits - second.other.logits).abs().max())
        warnings.append(
            f"two identical passes differ by up to {difference:.3g} logits: the model, or its "
            "kernels, are not deterministic"
        )
    if verdict is None:
        warnings.append("no pass has a milestone whose place could be compared")
    return result(
        {"repeatability_forward_pass": verdict, "bit_equal": same},
        thresholds={
            "tolerance_layers": material.config.measures.repeat_tolerance_layers,
            "jaccard_at_10": material.config.measures.repeat_jaccard,
        },
        warnings=warnings,
        **per_pass[0],
        bit_equal=same,
        passes=per_pass,
        **_scope(material),
    )


def _scope(material: Material) -> dict[str, Any]:
    chosen = variants.repeated(material)
    every = len(material.passes) + material.left_out
    return {
        "prompt_indices": [item.source.index for item in chosen],
        "passes_left_out": every - len(chosen),
    }


def _compare(material: Material, variant: variants.Variant) -> Comparison:
    """Read both with the norm lens, each with the norms and the head that computed it."""
    passes = variants.repeated(material)
    last = material.captured.last
    base = States(last.residual[: len(passes)], last.logits[: len(passes)])
    model: LanguageModel | None = variant.model
    norm = material.norm if model is None else NormLens(model, choice=material.config.norm_choice)
    answers = material.answers(passes)[:, None].repeat_interleave(material.n_rows, 0)
    hidden = material.through(material.norm, base.residual).flatten(0, 1)
    ours = material.read(hidden, _REQUEST, tokens=answers)
    assert ours.top_ids is not None
    theirs = material.read(
        material.through(norm, variant.states.residual).flatten(0, 1),
        _REQUEST,
        tokens=torch.cat([answers, ours.top_ids[:, :1].long()], dim=1),
        reference=Reference(index=torch.arange(len(hidden)), hidden=hidden),
        model=model,
    )
    return Comparison(variant.what, base, variant.states, ours, theirs)


def _ranks(comparison: Comparison) -> np.ndarray:
    """Return the rank of our top-1 in their reading; what became NaN has none, and is last."""
    ranks = comparison.theirs.token_rank
    assert ranks is not None
    return np.where(ranks[:, 1].numpy() > 0, ranks[:, 1].numpy(), 2**31 - 1)


def _decided(comparison: Comparison, least: float) -> dict[str, Any]:
    """Measure the rows whose top-1 leads clearly: elsewhere rounding may well swap two tokens."""
    gap, divergences = comparison.ours.top1_top2_gap, comparison.theirs.reference
    assert gap is not None and divergences is not None and divergences.kl_to_bits is not None
    moved = _ranks(comparison)[gap.numpy() >= least] - 1
    residual, repeated = comparison.base.residual.double(), comparison.other.residual.double()
    change = (residual - repeated).norm(dim=-1) / residual.norm(dim=-1).clamp_min(1e-30)
    return {
        "decided_rows": int(moved.size),
        "decided_flip_rate": float((moved > 0).mean()) if moved.size else None,
        "decided_max_rank_dev": float(moved.max()) if moved.size else None,
        "max_kl_bits": float(divergences.kl_to_bits.max()),
        "max_relative_residual_difference": float(change.max()),
        "max_abs_logit_difference": float(
            (comparison.base.logits - comparison.other.logits).abs().max()
        ),
        "became_nonfinite": int((comparison.theirs.nonfinite & ~comparison.ours.nonfinite).sum()),
    }


def _complaints(entry: dict[str, Any], rank: float, flips: float) -> list[str]:
    found: list[str] = []
    if entry["became_nonfinite"]:
        found.append(f"{entry['became_nonfinite']} rows become NaN or infinity")
    if not entry["decided_rows"]:
        return found
    if entry["decided_flip_rate"] > flips:
        found.append(f"{entry['decided_flip_rate']:.1%} of the decided top-1 tokens change")
    if entry["decided_max_rank_dev"] > rank:
        found.append(f"a decided top-1 falls to rank {1 + int(entry['decided_max_rank_dev'])}")
    return found


def _reading(material: Material, condition: str, read: Readout, number: int) -> measure.Reading:
    """Return what one condition makes of one pass."""
    assert read.top_ids is not None and read.token_rank is not None
    assert read.token_log2p is not None and read.top1_top2_gap is not None
    n = material.n_rows
    rows = slice(number * n, (number + 1) * n)
    rank = read.token_rank[rows, 0].numpy()
    probability = read.token_log2p[rows, 0].double().exp2().numpy()
    lead = np.where(rank == 1, read.top1_top2_gap[rows].numpy(), np.nan)
    found = onsets(
        Answers(rank, probability, lead), material.config.measures, material.model.d_vocab
    )
    best = preferred(found)
    ids = read.top_ids[rows].tolist()
    return measure.Reading(
        condition=condition,
        milestone=best[0] if best else None,
        layer=best[1] if best else None,
        top_ids=dict(enumerate(ids)),
        reference_top1_ranks=[1] * n if condition == "run" else read.token_rank[rows, 1].tolist(),
        p_answer=float(probability[-1]),
    )
