"""What the head says to nothing at all, and how much of a reading is owed to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.layers.diagnostics.material import Material, answer_id
from layerscope.experiments.layers.diagnostics.norms import facts_of
from layerscope.experiments.layers.diagnostics.sections import Section, result

_SHOWN = 10


def unembed_bias(material: Material) -> Section:
    """Measure the constant part of the logits: the head's bias, and the final norm's own bias.

    The reading without it is compared with the reading at every row of the norm lens. The gate
    asks whether any answer is top-1 only thanks to the constant, or whether it moves the milestone
    rows by more than half a bit.
    """
    model = material.model
    head = model.unembedding
    _, norm = model.norm_at(material.n_rows - 1, "final")
    facts = facts_of(model, model.norm_at(material.n_rows - 1, "final")[0], norm)
    constant = _constant(material, facts.bias)
    measured = {
        "present": head.bias is not None and bool(head.bias.any()),
        "l2_norm": 0.0 if head.bias is None else float(head.bias.detach().double().norm()),
        "max_abs": 0.0 if head.bias is None else float(head.bias.detach().double().abs().max()),
        "norm_bias_l2": 0.0 if facts.bias is None else float(facts.bias.norm()),
    }
    if constant is None:
        return result(
            {"reading_owes_nothing_to_bias": True},
            thresholds={"bias_bits": material.settings.bias_bits},
            **measured,
            constant_logits={"present": False},
            **material.scope,
        )
    entries = [_effect(material, n, constant) for n in range(len(material.passes))]
    owed = [entry for entry in entries if entry["answer_top1_only_with_bias"]]
    moved = [
        entry
        for entry in entries
        if entry["kl_bits_at_milestone"] is not None
        and entry["kl_bits_at_milestone"] > material.settings.bias_bits
    ]
    warnings = [
        f"{entry['fact_key']}: without the constant part of the head the answer is not top-1 at "
        f"row(s) {', '.join(map(str, entry['answer_top1_only_with_bias']))}"
        for entry in owed
    ] + [
        f"{entry['fact_key']}: the constant part of the head moves row {entry['milestone']} by "
        f"{entry['kl_bits_at_milestone']:.2g} bits"
        for entry in moved
    ]
    top = constant.topk(min(_SHOWN, len(constant)))
    strings = model.token_strings()
    return result(
        {"reading_owes_nothing_to_bias": not owed and not moved},
        thresholds={"bias_bits": material.settings.bias_bits},
        warnings=warnings,
        **measured,
        constant_logits={
            "present": True,
            "std": float(constant.std(correction=0)),
            "max_abs": float(constant.abs().max()),
            "top": [
                {"token": strings[token], "logit": value}
                for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ],
        },
        passes=entries,
        **material.scope,
    )


def _constant(material: Material, norm_bias: Tensor | None) -> Float[Tensor, " vocab"] | None:
    """Return the logits of a stream that carries nothing, before scale and softcap."""
    head = material.model.unembedding
    total = torch.zeros(head.d_vocab, dtype=torch.float64, device=head.weight.device)
    if norm_bias is not None:
        vector = norm_bias.to(head.weight.device).float()[None]
        plain = replace(head, bias=None, scale=1.0, softcap=None)
        total += plain.logits(vector)[0].double()
    if head.bias is not None:
        total += head.bias.detach().double()
    return total if float(total.abs().max()) > 0.0 else None


def _effect(material: Material, number: int, constant: Float[Tensor, " vocab"]) -> dict[str, Any]:
    """Compare every row of a pass with the same row without the constant."""
    head, item = material.model.unembedding, material.passes[number]
    plain = replace(head, scale=1.0, softcap=None)
    answer = answer_id(item)
    found = material.milestones(item)
    semantic = found.get("L_semantic")
    hidden = material.through(material.norm, material.captured.residual[number : number + 1, -1])
    flips, owed, at_milestone = 0, [], None
    for row in range(material.n_rows):
        products = plain.logits(hidden[0, row][None]).double()
        without = _transformed(material, products - constant)
        given = _transformed(material, products)
        flips += int(given.argmax() != without.argmax())
        if _first(given, answer) and not _first(without, answer):
            owed.append(row)
        if row == semantic:
            at_milestone = _kl_bits(given, without)
    return {
        **material.describe(item),
        "milestone": semantic,
        "top1_flip_rate": flips / material.n_rows,
        "answer_top1_only_with_bias": owed,
        "kl_bits_at_milestone": at_milestone,
    }


def _transformed(material: Material, products: Float[Tensor, "1 vocab"]) -> Tensor:
    head = material.model.unembedding
    return head.cap(products * head.scale)[0]


def _first(logits: Float[Tensor, " vocab"], token: int) -> bool:
    return bool(logits[token] >= logits.max())


def _kl_bits(given: Float[Tensor, " vocab"], without: Float[Tensor, " vocab"]) -> float:
    log_p, log_q = given.log_softmax(-1), without.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum()) / 0.6931471805599453
