"""What a check hands back: JSON-able, and either a result or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

Section = dict[str, Any]


class Skipped(Exception):
    """Raised inside a check that cannot be made here; the message becomes the section's reason."""


def skipped(reason: str) -> Section:
    """Return the section of a check that was not made."""
    return {"status": "skipped", "reason": reason}


def result(
    gates: Mapping[str, bool | None],
    *,
    thresholds: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    **content: Any,
) -> Section:
    """Return the section of a check that was made.

    Args:
        gates: by name, True where it holds, False where it does not; None needs a warning that
            says why it could not be decided.
        thresholds: the numbers that decide the gates.
        warnings: one line for everything a reader must know before believing the rest.
        content: the measurements.
    """
    return jsonable(
        {
            "status": "ok",
            "gates": dict(gates),
            "thresholds": dict(thresholds or {}),
            "warnings": list(warnings),
            **content,
        }
    )


def jsonable(value: Any) -> Any:
    """Return plain values: tensors and arrays as lists, NaN and infinity as None."""
    if isinstance(value, Tensor):
        return jsonable(value.tolist())
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in cast("Any", value).items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in cast("Any", value)]
    return value


def all_hold(gates: Sequence[bool | None]) -> bool | None:
    """Return False where any gate fails, else None where none was decided, else True."""
    known = [gate for gate in gates if gate is not None]
    return all(known) if known else None
