"""Numbers that a run computes a second time, the slow way, to say how far the two ways differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerscope.experiments.patching.gather import finite


def spread(total: int, count: int) -> list[int]:
    """Return `count` of `total` indices, evenly spread, so that no part goes unchecked."""
    count = min(count, total)
    first = total // (2 * count) if count else 0
    return [first + at * total // count for at in range(count)]


def compared(again: Tensor, fast: Tensor) -> dict[str, Any]:
    """Return how many numbers were compared, the largest difference, and how large they are."""
    if not len(fast):
        return {"cells": 0}
    return {
        "cells": len(fast),
        "error": finite(float((again - fast).abs().max())),
        "scale": finite(float(torch.maximum(again.abs(), fast.abs()).max())),
    }


def verified(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many numbers of all units were computed twice, and the worst difference."""
    found: dict[str, Any] = {"cells": sum(int(check["cells"]) for check in checks)}
    if not found["cells"]:
        return found
    errors = [check["error"] for check in checks]
    known = [error for error in errors if error is not None]
    scales = [check["scale"] for check in checks if check["scale"] is not None]
    return found | {
        "worst_error": max(known) if len(known) == len(errors) else None,
        "scale": max(scales) if known else None,
    }
