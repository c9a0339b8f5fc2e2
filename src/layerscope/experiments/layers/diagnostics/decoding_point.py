"""Does a milestone hang on which norm reads the row? Three norms, the same residual."""

from __future__ import annotations

from typing import Any

import torch

from layerscope.experiments.layers.diagnostics.material import Material, answer_id
from layerscope.experiments.layers.diagnostics.norms import READINGS, norm_for, why_absent
from layerscope.experiments.layers.diagnostics.onsets import preferred
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result, skipped
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.measures import decoding_point as measure
from layerscope.readout import Readout, Request

_TOP = 50
_REQUEST = Request(
    entropy=False,
    top_k=_TOP,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)


def decoding_point(material: Material) -> Section:
    """Read the milestone rows of every pass under each norm that belongs there.

    The run's own norm choice is the reference. At a row, two norms agree where the answer is top-1
    under both, or under neither; the gate also asks for half of the ten most likely tokens at the
    preferred milestone.
    """
    own = material.config.norm_choice
    choices = [own, *(name for name in READINGS if name != own)]
    absent = {name: why for name in choices if (why := why_absent(material.model, name))}
    choices = [name for name in choices if name not in absent]
    per_pass: list[dict[str, Any]] = []
    without: list[int] = []
    for number, item in enumerate(material.passes):
        found = material.milestones(item)
        targets = measure.targets_of(found)
        if not targets:
            without.append(item.source.index)
            continue
        section = measure.decoding_point(
            targets,
            _decode(material, number, item, targets, choices),
            arch=material.model.architecture,
            missing=absent,
            preferred=preferred(found),
            config=material.config.measures,
        )
        per_pass.append({**material.describe(item), **section})
    if not per_pass:
        return skipped("no pass has a milestone: the answer is never among the five most likely")
    gate = all_hold([entry["gate"]["decoding_point_consistent"] for entry in per_pass])
    warnings = [line for entry in per_pass for line in _complaints(entry)]
    warnings += [f"{name} was not read: {why}" for name, why in absent.items()]
    if gate is None:
        warnings.append("there is no second norm at any milestone row, so nothing was compared")
    return result(
        {"decoding_point_consistent": gate},
        thresholds={"jaccard_at_10": material.config.measures.decoding_jaccard},
        warnings=warnings,
        **per_pass[0],
        passes=per_pass,
        prompt_indices_without_milestone=without,
        **material.scope,
    )


def _decode(
    material: Material,
    number: int,
    item: PreparedPass,
    targets: list[tuple[str, int]],
    choices: list[str],
) -> dict[str, dict[int, measure.Decoded]]:
    """Read the target rows under every choice that has a norm there."""
    places: list[tuple[str, int]] = []
    hidden: list[torch.Tensor] = []
    for choice in choices:
        for row in sorted({layer for _, layer in targets}):
            found = norm_for(material.model, choice, row)
            if found is None and choice == material.config.norm_choice:
                found = material.model.norm_at(row, material.config.norm_choice)
            if found is not None:
                places.append((choice, row))
                with torch.no_grad():
                    hidden.append(found[1](material.captured.residual[number, -1, row][None]))
    tokens = torch.full((len(places), 1), answer_id(item))
    read = material.read(torch.cat(hidden).float(), _REQUEST, tokens=tokens)
    decoded: dict[str, dict[int, measure.Decoded]] = {choice: {} for choice in choices}
    for index, (choice, row) in enumerate(places):
        decoded[choice][row] = _one(read, index)
    return decoded


def _one(read: Readout, index: int) -> measure.Decoded:
    assert read.token_rank is not None and read.token_log2p is not None
    assert read.top_ids is not None and read.top_log2p is not None
    return measure.Decoded(
        top_ids=read.top_ids[index].tolist(),
        p_top1=float(read.top_log2p[index, 0].double().exp2()),
        answer_rank=int(read.token_rank[index, 0]) or None,
        p_answer=float(read.token_log2p[index, 0].double().exp2()),
    )


def _complaints(entry: dict[str, Any]) -> list[str]:
    """Name the rows whose truth depends on the norm, once for each other norm."""
    if entry["gate"]["decoding_point_consistent"] is not False:
        return []
    off = [e for e in entry["per_target"] if e.get("rank1_agree") is False]
    lines = [
        f"{entry['fact_key']}: at row {layer} the answer is top-1 under only one of "
        f"{entry['reference']} and {choice}"
        for layer, choice in dict.fromkeys((e["layer"], e["choice"]) for e in off)
    ]
    return lines or [f"{entry['fact_key']}: the norms share few of the ten most likely tokens"]
