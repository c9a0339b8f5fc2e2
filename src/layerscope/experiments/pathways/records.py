"""Records as several programs write them, brought into one form; what is missing is named."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

SHARED = ("", "*", "all", "baseline", "shared")  # trials that count for every feature
_EFFECTS = (
    "safe_effect_size",
    "risky_effect_size",
    "safe_p_value",
    "risky_p_value",
    "safe_q_value",
    "risky_q_value",
)
_RESPONSE_NAMES = {
    "feature_name": "feature",
    "patch_condition": "condition",
}


@dataclass(frozen=True)
class CausalRecord:
    """One verdict on one feature.

    Attributes:
        space: of the id, None where the record carries none.
        cohen_d: NaN where the effect was not defined.
        effects: effect sizes and p-values by side, as far as they were written.
        stamp: digits of the file's time stamp, to tell the newest.
        file, index: where it stands.
    """

    space: str | None
    layer: int
    feature_id: int
    feature: str
    cohen_d: float
    is_causal: bool
    is_causal_safe: bool | None
    is_causal_risky: bool | None
    stamp: str
    file: str
    index: int
    effects: Mapping[str, float | None] = field(default_factory=lambda: {})

    @property
    def verdict(self) -> tuple[Any, ...]:
        """What two records of one feature should agree on."""
        effect = None if math.isnan(self.cohen_d) else round(self.cohen_d, 9)
        return (effect, self.is_causal, self.is_causal_safe, self.is_causal_risky)

    @property
    def side(self) -> str:
        """Return "safe", "risky", "mixed", "unclear" or "none"."""
        if not self.is_causal:
            return "none"
        sides = (bool(self.is_causal_safe), bool(self.is_causal_risky))
        return {(True, False): "safe", (False, True): "risky", (True, True): "mixed"}.get(
            sides, "unclear"
        )


@dataclass(frozen=True)
class Fault:
    """Why a record cannot be used, or is suspicious."""

    code: str
    message: str
    detail: Any = None


def causal_record(
    raw: Any, *, file: str, index: int, fields: Mapping[str, Any]
) -> tuple[CausalRecord | None, list[Fault]]:
    """Return one checkpoint record, or None with the reasons."""
    if not isinstance(raw, Mapping):
        return None, [Fault("not_a_record", "a result is no object", type(raw).__name__)]
    given = cast("Mapping[str, Any]", raw)
    nested = given.get("causality")
    causality: Mapping[str, Any] = (
        cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else {}
    )
    faults = [
        Fault("missing_field", f"a result lacks '{name}'")
        for name in ("feature", "layer", "feature_id", "cohen_d")
        if given.get(name) is None and not (name == "cohen_d" and name in given)
    ]
    sides = [causality.get(f"is_causal_{side}", given.get(f"is_causal_{side}")) for side in _SIDES]
    verdict = given.get("is_causal")
    if verdict is None and any(side is not None for side in sides):
        verdict = any(side is True for side in sides)
    if verdict is None:
        faults.append(Fault("missing_field", "a result lacks 'is_causal'"))
    for name, value in (("is_causal", verdict), *zip(_SIDE_NAMES, sides, strict=True)):
        if value is not None and not isinstance(value, bool):
            faults.append(Fault("bad_verdict", f"'{name}' is neither true nor false", repr(value)))
    layer, feature_id = (_whole(given.get(name)) for name in ("layer", "feature_id"))
    for name, value in (("layer", layer), ("feature_id", feature_id)):
        if value is None and given.get(name) is not None:
            faults.append(Fault("bad_id", f"'{name}' is no whole number", repr(given[name])))
    effect = given.get("cohen_d")
    if effect is not None and (isinstance(effect, bool) or not isinstance(effect, int | float)):
        faults.append(Fault("bad_effect", "'cohen_d' is no number", repr(effect)))
    if faults or layer is None or feature_id is None:
        return None, faults
    feature = str(given["feature"])
    if feature != f"L{layer}-{feature_id}":
        message = "'feature' does not name its own layer and feature_id"
        return None, [Fault("wrong_id", message, f"{feature} is not L{layer}-{feature_id}")]
    space = given.get("space", fields.get("space"))
    made = CausalRecord(
        space=None if space is None else str(space),
        layer=layer,
        feature_id=feature_id,
        feature=feature,
        cohen_d=math.nan if effect is None else float(effect),
        is_causal=bool(verdict),
        is_causal_safe=sides[0],
        is_causal_risky=sides[1],
        stamp=stamp_of(given.get("timestamp", fields.get("timestamp")), file),
        file=file,
        index=index,
        effects={
            name: _number(causality.get(name, given.get(name)))
            for name in (*_EFFECTS, "p_value", "q_value")
        },
    )
    return made, []


_SIDES = ("safe", "risky")
_SIDE_NAMES = ("is_causal_safe", "is_causal_risky")


@dataclass(frozen=True)
class ResponseRecord:
    """One generated response, for one feature under one condition.

    Attributes:
        valid: whether it could be parsed; None where that was not written.
    """

    feature: str
    condition: str
    trial: int | None
    response: str
    valid: bool | None

    @property
    def shared(self) -> bool:
        """Whether the trial is a baseline that counts for every feature."""
        return self.feature.lower() in SHARED


def response_record(
    raw: Any, aliases: Mapping[str, str]
) -> tuple[ResponseRecord | None, list[Fault]]:
    """Return one record of a response log, or None with the reasons."""
    if not isinstance(raw, Mapping):
        return None, [Fault("not_a_record", "a response is no object", type(raw).__name__)]
    given = cast("Mapping[str, Any]", raw)
    values = {name: given.get(name) for name in ("feature", "condition", "response")}
    for other, name in _RESPONSE_NAMES.items():
        if values[name] is None:
            values[name] = given.get(other)
    if given.get("feature") is None and "feature" in given and values["feature"] is None:
        values["feature"] = ""  # written as null: a shared baseline
    faults = [
        Fault("missing_field", f"a response lacks '{name}'")
        for name, value in values.items()
        if value is None
    ]
    if faults:
        return None, faults
    nested = given.get("parsed")
    parsed: Mapping[str, Any] = (
        cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else {}
    )
    valid = parsed.get("valid", given.get("is_valid"))
    condition = str(values["condition"])
    prompt_type = given.get("prompt_type")
    if isinstance(prompt_type, str) and condition in ("safe_mean", "risky_mean"):
        condition = f"{prompt_type}_prompt_{condition}_patch"
    return ResponseRecord(
        feature=str(values["feature"]),
        condition=aliases.get(condition, condition),
        trial=_whole(given.get("trial")),
        response=str(values["response"]),
        valid=valid if isinstance(valid, bool) else None,
    ), []


def stamp_of(given: Any, file: str) -> str:
    """Return the digits of a time stamp, or of the file name where there is none."""
    digits = re.sub(r"\D", "", str(given)) if given is not None else ""
    if not digits:
        found = re.findall(r"\d{8}[_T-]?\d{6}", file)
        digits = re.sub(r"\D", "", found[-1]) if found else ""
    return digits[:20]


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
