"""The checks that needed the model again: which gates held, which failed, what was not checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerscope.reports.text import visible

VERDICTS: Mapping[bool | None, str] = {True: "holds", False: "fails", None: "undecided"}
_NAMES = {
    "head_transforms": "last row against the head",
    "repeatability": "precision, batch, attention",
    "repeatability_forward": "the same prompt twice",
    "decoding_point": "which norm reads the row",
    "gate_stability_small_scale": "logits scaled by a few percent",
    "lens_consistency": "lenses rank tokens alike",
    "position_window": "other positions of the prompt",
    "skip_layers_sanity": "blocks left out",
    "tuned_audit": "what the tuned lens does",
    "tuned_attribution": "what its gain is owed to",
    "normalization_provenance": "the norms are what they seem",
    "numeric_health": "numbers stay finite",
    "copy_mask": "tokens left out of echo",
    "unembed_bias": "bias of the unembedding",
    "layer_map": "rows are the model's",
    "prism_summary": "prism beside norm",
    "tau_norm_per_layer": "one temperature per layer",
}


@dataclass(frozen=True)
class Check:
    """One check: its gates as (name, verdict), what it warns of, or why it was not made."""

    code: str
    name: str
    gates: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    skipped: str | None

    @property
    def verdict(self) -> str:
        """The worst of its gates; "measured" without any, "not made" where it was skipped."""
        if self.skipped is not None:
            return "not made"
        found = {verdict for _, verdict in self.gates}
        return next((v for v in ("fails", "undecided", "holds") if v in found), "measured")


def checks(summary: Mapping[str, Any]) -> list[Check]:
    """Return every check of a summary: those with a failed gate first, those not made last."""
    sections: Mapping[str, Any] = summary.get("diagnostics") or {}
    found = [_check(code, section) for code, section in sections.items()]
    order = ("fails", "undecided", "holds", "measured", "not made")
    return sorted(found, key=lambda check: order.index(check.verdict))


def checks_line(summary: Mapping[str, Any]) -> str | None:
    """Say in one line how many checks were made and which failed; None where none was asked for."""
    found = checks(summary)
    if not found:
        return None
    made = [check for check in found if check.skipped is None]
    failed = [check.name for check in made if check.verdict == "fails"]
    text = f"{len(made)} of {len(found)} checks were made with the model again; "
    return text + (f"failed: {', '.join(failed)}." if failed else "none failed.")


def _check(code: str, section: Mapping[str, Any]) -> Check:
    made = section.get("status", "ok") == "ok"
    gates: Mapping[str, bool | None] = section.get("gates") or {} if made else {}
    return Check(
        code=code,
        name=_NAMES.get(code, code.replace("_", " ")),
        gates=tuple(
            (visible(name, keep_spaces=True), VERDICTS[held]) for name, held in gates.items()
        ),
        warnings=tuple(
            visible(str(line), keep_spaces=True) for line in (section.get("warnings") or ())
        ),
        skipped=None if made else visible(str(section.get("reason") or ""), keep_spaces=True),
    )
