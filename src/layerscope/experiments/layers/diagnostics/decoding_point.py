"""Does a milestone hang on which norm reads the row? Three norms, the same residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.onsets import PREFERRED, preferred, recorded
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result, skipped
from layerscope.readout import Readout, Request

READINGS = ("same_norm", "next_norm", "final")
TARGETS = (*PREFERRED, "first_rank_le_5")
TOP = 50
_REQUEST = Request(
    entropy=False,
    top_k=TOP,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)

Norm = Callable[[Tensor], Tensor]


def decoding_point(material: Material) -> Section:
    """Read the milestone rows of every pass under each norm that belongs there.

    `same_norm` is the pre-MLP norm of the block that wrote the row, `next_norm` the input norm of
    the block that reads it, `final` the last norm. At each row two readings agree where both say
    that the answer is top-1, or both that it is not.
    """
    captured = material.captured
    entries: list[dict[str, Any]] = []
    untested = 0
    for number, item in enumerate(material.passes):
        part = material.parts.get((item.source.index, "norm"))
        if part is None:
            return skipped("the run has no norm lens, so there are no milestones to test")
        found = recorded(part, material.config.measures, material.model.d_vocab)
        targets = _targets(found)
        untested += not targets
        best = preferred(found)
        for layer, names in targets.items():
            readings = _read(material, captured.residual[number, -1, layer], layer, item.alignment)
            entries.append(
                {
                    **material.describe(item),
                    "layer": layer,
                    "targets": names,
                    "is_preferred": best is not None and best[1] == layer,
                    **_agreement(readings, material.config.norm_choice),
                }
            )
    if not entries:
        return skipped("no pass has a milestone: the answer is never among the five most likely")
    gate = _gate(entries, material.settings.jaccard)
    warnings = [] if gate is not False else [_complaint(entries)]
    missing = {name: why for name in READINGS if (why := _absent(material, name))}
    warnings += [f"{name}: {why}" for name, why in missing.items()]
    return result(
        {"decoding_point_consistent": gate},
        thresholds={"jaccard_at_10": material.settings.jaccard},
        warnings=warnings,
        baseline=material.config.norm_choice,
        unavailable=missing,
        at=entries,
        passes_without_milestone=untested,
        **material.scope,
    )


def norm_for(material: Material, reading: str, row: int) -> tuple[str, Norm] | None:
    """Return name and norm of a reading at a row, None where there is none of its own there.

    The final norm stands in for `next_norm` in families without input norms and at the last row;
    there it is no reading of its own, and None is returned.
    """
    model = material.model
    name, norm = model.norm_at(row, "final")
    if reading == "final":
        return name, norm
    if reading == "next_norm":
        following, other = model.norm_at(row, "next_norm")
        return None if following == name else (following, other)
    structure: Any = getattr(model.backend, "structure", None)
    blocks = getattr(structure, "blocks", None)
    named = None if blocks is None or row < 1 else getattr(blocks[row - 1], "mlp_norm", None)
    if model.backend.name != "huggingface" or named is None:
        return None

    def apply(residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        parameter = next(named.module.parameters(), residual)
        return named.module(residual.to(parameter.device, parameter.dtype))

    return named.name, apply


def _absent(material: Material, reading: str) -> str | None:
    """Say why a reading exists at no row, None where it exists."""
    if any(norm_for(material, reading, row) for row in range(1, material.n_rows)):
        return None
    if reading == "same_norm":
        if material.model.backend.name != "huggingface":
            return f"the {material.model.backend.name} backend does not name norms before the MLP"
        return "the blocks of this family have no norm of their own before the MLP"
    return "the blocks of this family read the stream without a norm"


def _targets(found: dict[str, int | None]) -> dict[int, list[str]]:
    """Return the rows to test and the milestones at each; the run's second row counts too."""
    rows: dict[int, list[str]] = {}
    for name in TARGETS:
        layer = found.get(name)
        if layer is None:
            continue
        rows.setdefault(layer, []).append(name)
        if name == "L_semantic_strong_run2":
            rows.setdefault(layer + 1, []).append(f"{name}+1")
    return dict(sorted(rows.items()))


def _read(
    material: Material, residual: Float[Tensor, " d_model"], layer: int, alignment: Any
) -> dict[str, dict[str, Any]]:
    norms = {name: norm_for(material, name, layer) for name in READINGS}
    present = {name: found for name, found in norms.items() if found is not None}
    with torch.no_grad():
        hidden = torch.stack([norm(residual[None]).float()[0] for _, norm in present.values()])
    tokens = torch.full((len(hidden), 1), alignment.first_id)
    readout = material.read(hidden, _REQUEST, tokens=tokens)
    return {
        name: {"module": module, **_one(readout, number)}
        for number, (name, (module, _)) in enumerate(present.items())
    }


def _one(readout: Readout, number: int) -> dict[str, Any]:
    assert readout.token_rank is not None and readout.token_log2p is not None
    assert readout.top_ids is not None
    return {
        "answer_rank": int(readout.token_rank[number, 0]),
        "p_answer": float(readout.token_log2p[number, 0].double().exp2()),
        "top_ids": readout.top_ids[number].tolist(),
    }


def _agreement(readings: dict[str, dict[str, Any]], choice: str) -> dict[str, Any]:
    """Compare every other reading with the run's own norm choice."""
    base = readings.get(choice) or readings["final"]
    own = choice if choice in readings else "final"
    others = {name: other for name, other in readings.items() if name != own}
    compared = {
        name: {
            "rank1_agree": (other["answer_rank"] == 1) == (base["answer_rank"] == 1),
            "delta_answer_rank": other["answer_rank"] - base["answer_rank"],
            "top1_token_agree": other["top_ids"][0] == base["top_ids"][0],
            "jaccard_at_10": _jaccard(other["top_ids"][:10], base["top_ids"][:10]),
            "jaccard_at_50": _jaccard(other["top_ids"], base["top_ids"]),
        }
        for name, other in others.items()
    }
    kept = ("module", "answer_rank", "p_answer")
    return {
        "readings": {
            name: {key: reading[key] for key in kept} | {"top1_id": reading["top_ids"][0]}
            for name, reading in readings.items()
        },
        "against": compared,
        "rank1_agree": all_hold([entry["rank1_agree"] for entry in compared.values()]),
    }


def _gate(entries: list[dict[str, Any]], least: float) -> bool | None:
    """Every tested row keeps its truth value; at a preferred milestone the top 10 overlap too."""
    decided = [entry for entry in entries if entry["rank1_agree"] is not None]
    if not decided:
        return None
    overlaps = [
        other["jaccard_at_10"]
        for entry in decided
        if entry["is_preferred"]
        for other in entry["against"].values()
    ]
    return all(entry["rank1_agree"] for entry in decided) and all(o >= least for o in overlaps)


def _complaint(entries: list[dict[str, Any]]) -> str:
    off = [entry for entry in entries if entry["rank1_agree"] is False]
    passes = len({entry["prompt_index"] for entry in off})
    if not off:
        return "at a preferred milestone the norms share few of their ten most likely tokens"
    return (
        f"whether the answer is top-1 depends on the norm at {len(off)} of {len(entries)} "
        f"milestone rows ({passes} passes): report the norm with the milestone"
    )


def _jaccard(ours: list[int], theirs: list[int]) -> float:
    both = len(set(ours) & set(theirs))
    return both / (len(set(ours)) + len(set(theirs)) - both)
