"""Which norm decoded which row, and what it did to the residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from layerscope.measures.rows import PassRows


def normalisation_provenance(
    part: PassRows,
    *,
    arch: str | None,
    strategy: str | Mapping[str, str],
    epsilon_inside_sqrt: bool | None = None,
    gain_used: bool | None = None,
) -> dict[str, Any]:
    """Return, per row, the norm that was used and its effect: lengths, their ratio, the cosine.

    `strategy` is the choice of norm, or a mapping of the primary choice and the ablations run.
    """
    columns = ("layer", "norm_module", "resid_norm_ratio", "delta_resid_cos", "resid_norm")
    rows = part.frame.select(pl.col(name) for name in columns)
    return {
        "status": "ok",
        "arch": arch,
        "strategy": dict(strategy) if isinstance(strategy, Mapping) else strategy,
        "per_layer": [
            {
                "layer": layer,
                "ln_source": module or part.lens,
                "eps_inside_sqrt": epsilon_inside_sqrt,
                "scale_gamma_used": gain_used,
                "resid_norm_ratio": ratio,
                "delta_resid_cos": cosine,
                "raw_resid_norm": length,
            }
            for layer, module, ratio, cosine, length in rows.iter_rows()
        ],
    }


def layer_map(part: PassRows) -> list[dict[str, Any]]:
    """Return, per row, the block it follows, the stream it is read from, and the norm used."""
    last = part.n_layers
    streams = {0: "pre_block", last: "unembed_head"}
    return [
        {
            "layer": layer,
            "block": f"blocks[{max(0, layer - 1)}]",
            "stream": streams.get(layer, "post_block"),
            "norm": module,
        }
        for layer, module in part.frame.select("layer", "norm_module").iter_rows()
    ]
