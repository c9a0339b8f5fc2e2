"""Which row is which: the block it follows, what that block is, and the norm that decodes it."""

from __future__ import annotations

from typing import Any

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, result
from layerscope.models.sites import Site

_PARTS = {
    "attention": "attn.pattern",
    "neurons": "mlp.pre",
    "experts": "mlp.router",
    "resid_mid": "resid_mid",
}


def layer_map(material: Material) -> Section:
    """Return, per row, the site that was read, the block that wrote it, its parts, and its norm.

    The gate: rows and norms in the table are those that the model gives for its norm choice.
    """
    model, choice = material.model, material.config.norm_choice
    rows = [_row(material, row) for row in range(material.n_rows)]
    recorded = {
        (layer, module)
        for layer, module in material.table.rows.filter(material.table.rows["lens"] == "norm")
        .select("layer", "norm_module")
        .unique()
        .iter_rows()
    }
    expected = {(row["layer"], row["norm"]) for row in rows}
    wrong = sorted(recorded - expected)
    gate = None if not recorded else recorded == expected
    warnings = [
        f"the table says that row {layer} was decoded with {module or 'no norm'}, the model names "
        f"{model.norm_at(layer, choice)[0] if 0 <= layer < material.n_rows else 'no such row'}"
        for layer, module in wrong
    ]
    if gate is None:
        warnings.append("the run has no norm lens, so its norms could not be compared")
    return result(
        {"rows_are_the_models": gate},
        warnings=warnings,
        n_layers=model.n_layers,
        architecture=model.architecture,
        family=model.family,
        norm_choice=choice,
        rows=rows,
    )


def _row(material: Material, row: int) -> dict[str, Any]:
    model = material.model
    last = model.n_layers
    block = row - 1
    parts: dict[str, Any] = {}
    if row > 0:
        parts = {
            name: model.backend.why_not(Site(kind, block)) is None for name, kind in _PARTS.items()
        }
    streams = {0: "pre_block", last: "unembed_head"}
    return {
        "layer": row,
        "site": "resid_pre.0" if row == 0 else f"resid_post.{block}",
        "block": f"blocks[{max(0, block)}]",
        "stream": streams.get(row, "post_block"),
        "depth": round(row / last, 4),
        "norm": model.norm_at(row, material.config.norm_choice)[0],
        "block_has": parts,
    }
