"""Does the last row of every lens equal the model's own head, and if not, what would explain it?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result
from layerscope.experiments.layers.diagnostics.temperatures import (
    BestTemperature,
    best_temperature,
)
from layerscope.measures.last_row import last_row_warns
from layerscope.readout import Unembedding

TRANSFORMS = ("none", "scale", "softcap", "scale_then_softcap")


def head_transforms(material: Material) -> Section:
    """Compare row n of every lens with the model's head, under every transform of the head.

    A lens passes where KL(lens || head), with all transforms that the head has, is rounding. The
    raw lens is measured but has no gate: it leaves out the norm on purpose.
    """
    captured, settings = material.captured, material.settings
    bound = settings.exact_bits_low if material.low else settings.exact_bits
    entries: list[dict[str, Any]] = []
    gates: dict[str, bool | None] = {}
    for name, lens in material.lenses.items():
        hidden = lens.transform(captured.last.residual[:, -1], material.model.n_layers)
        found = [
            _compare(material, hidden[n], captured.logits[n], bound)
            for n in range(len(material.passes))
        ]
        entries += [
            {**material.describe(item), "lens": name, **values}
            for item, values in zip(material.passes, found, strict=True)
        ]
        if name != "raw":
            gates[f"last_row_exact.{name}"] = all_hold([entry["exact"] for entry in found])
    head = material.model.unembedding
    first = next((e for e in entries if e["lens"] == "norm"), entries[0])
    warnings = [
        f"the last row of the {name} lens is {_worst(entries, name):.3g} bits from the model's "
        f"head; {_explanation(entries, name)}"
        for gate, holds in gates.items()
        if holds is False and (name := gate.split(".", 1)[1])
    ]
    return result(
        gates,
        thresholds={
            "exact_bits": bound,
            "warn_bits": material.config.measures.last_row_kl_bits,
        },
        warnings=warnings,
        cfg_transform={
            "scale": None if head.scale == 1.0 else head.scale,
            "softcap": head.softcap,
        },
        head_bias=head.bias is not None,
        **first,
        at=entries,
        **material.scope,
    )


def _compare(
    material: Material,
    hidden: Float[Tensor, " d_model"],
    head_logits: Float[Tensor, " vocab"],
    bound: float,
) -> dict[str, Any]:
    head = material.model.unembedding
    after = {
        name: _kl(transformed.logits(hidden[None])[0], head_logits)
        for name, transformed in _heads(head).items()
        if transformed is not None
    }
    full = head.logits(hidden[None])[0]
    kl = _kl(full, head_logits)
    # What is exact needs no temperature, and the search reads the vocabulary many times.
    exact = kl <= bound
    fit = BestTemperature(1.0, kl, kl, True) if exact else best_temperature(full, head_logits)
    return {
        "kl_to_final_bits": kl,
        "exact": exact,  # NaN is not exact
        "top1_agree": bool(full.argmax() == head_logits.argmax()),
        "p_top1_lens": float(full.double().softmax(-1).max()),
        "p_top1_model": float(head_logits.double().softmax(-1).max()),
        "kl_after_transform_bits": {name: after.get(name) for name in TRANSFORMS},
        "temp_est": fit.temperature,
        "temp_settled": fit.settled,
        "kl_after_temp_bits": fit.kl_after_bits,
        "warn_high_last_layer_kl": last_row_warns(kl, fit.kl_after_bits, material.config.measures),
    }


def _heads(head: Unembedding) -> dict[str, Unembedding | None]:
    """Return the head with some of its transforms; None where it has no such transform."""
    scaled, capped = head.scale != 1.0, head.softcap is not None
    return {
        "none": replace(head, scale=1.0, softcap=None),
        "scale": replace(head, softcap=None) if scaled else None,
        "softcap": replace(head, scale=1.0) if capped else None,
        "scale_then_softcap": head if scaled and capped else None,
    }


def _kl(logits: Float[Tensor, " vocab"], reference: Float[Tensor, " vocab"]) -> float:
    log_p, log_q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return max(float((log_p.exp() * (log_p - log_q)).sum() / torch.log(torch.tensor(2.0))), 0.0)


def _of(entries: list[dict[str, Any]], lens: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["lens"] == lens]


def _worst(entries: list[dict[str, Any]], lens: str) -> float:
    return max(entry["kl_to_final_bits"] for entry in _of(entries, lens))


def _explanation(entries: list[dict[str, Any]], lens: str) -> str:
    """Say what brings the worst pass nearest: another set of transforms, or one temperature."""
    worst = max(_of(entries, lens), key=lambda entry: entry["kl_to_final_bits"])
    kl = worst["kl_to_final_bits"]
    transforms: dict[str, float | None] = worst["kl_after_transform_bits"]
    known = {name: value for name, value in transforms.items() if value is not None}
    best = min(known, key=known.__getitem__)
    if known[best] < 0.1 * kl:
        return f"with transform '{best}' of the head it would be {known[best]:.3g}"
    if worst["kl_after_temp_bits"] < 0.1 * kl:
        return f"temperature {worst['temp_est']:.3g} explains it"
    return "neither a transform of the head nor a temperature explains it: suspect the norm"
