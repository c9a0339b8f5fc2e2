"""Is a tuned lens good enough to stand in for the last blocks? (Layer-lens reference, 2.16.)

The cross-entropy of held-out text, per token, when the last m blocks are replaced by the translator
of row n - m, against that of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig

SKIPS = (2, 4, 8)


def skip_layers(
    full_nats: float,
    skipped_nats: Mapping[int, float],
    *,
    tokens: int,
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return the relative increase of perplexity with m blocks left out, as `m=2` and so on.

    Both sides are mean cross-entropies over the same held-out tokens, in nats.
    `tuned_lens_regression` is true when leaving out 2 blocks (or the fewest measured) costs more
    than 5%. Raises TableError without tokens or without a measurement.
    """
    config = config or MeasureConfig()
    if tokens < 1 or not skipped_nats:
        raise TableError("no held-out tokens were scored with blocks left out; give some text")
    increases = {m: math.exp(value - full_nats) - 1.0 for m, value in sorted(skipped_nats.items())}
    fewest = min(increases)
    regression = increases[fewest] > config.skip_increase
    return {
        "status": "ok",
        **{f"m={m}": value for m, value in increases.items()},
        "tokens": tokens,
        "full_nats": full_nats,
        "skipped_nats": {f"m={m}": value for m, value in sorted(skipped_nats.items())},
        "threshold": config.skip_increase,
        "tuned_lens_regression": regression,
        "tuned_lens_skip_warning": increases[fewest] if regression else None,
    }
