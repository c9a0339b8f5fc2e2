"""``layerscope graph``: the attribution graph of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerscope.cli.common import (
    DEFAULT_FOLDER,
    DeviceOption,
    DtypeOption,
    JsonOption,
    StoreOption,
    console,
    emit_json,
)

HELP = """Explain a prompt's next token by transcoder features, errors and tokens.

MLPs are replaced by their transcoders; attention patterns and norms are held fixed, so that every
node is the sum of its sources. The summary says by how much that fails. Writes nodes and edges,
graph.json for Neuronpedia's viewer, and a page.

- `layerscope graph MODEL --transcoders FOLDER --prompt "The capital of France is"`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("graph", help=HELP)(graph)


def graph(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id or local folder.")],
    transcoders: Annotated[
        str, typer.Option("--transcoders", help="Folder, or OWNER/REPOSITORY[/FOLDER].")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", help="The text whose next token is explained.")
    ],
    max_features: Annotated[
        int, typer.Option("--max-features", min=1, help="Feature nodes that are expanded.")
    ] = 256,
    logits: Annotated[
        int, typer.Option("--logits", min=1, help="Next tokens that are explained, at most.")
    ] = 5,
    node_share: Annotated[
        float, typer.Option("--node-share", help="Share of influence that the kept nodes have.")
    ] = 0.8,
    edge_share: Annotated[
        float, typer.Option("--edge-share", help="Share of influence that the kept edges have.")
    ] = 0.98,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = DEFAULT_FOLDER,
    store: StoreOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write the page.")] = True,
    json: JsonOption = False,
) -> None:
    """Make one graph and keep it."""
    from layerscope.cli.keep import KeepOptions, keep, load_quietly
    from layerscope.experiments.attribution_graph import execute, plan, viewer_graph
    from layerscope.features.pathways import GraphOptions
    from layerscope.files import write_json
    from layerscope.models import load
    from layerscope.reports.attribution_graph import write_attribution_graph

    options = GraphOptions(
        max_features=max_features, logits=logits, node_share=node_share, edge_share=edge_share
    )
    planned = load_quietly(
        lambda: plan(load(model, device=device, dtype=dtype), prompt, transcoders, options), model
    )
    kept = keep(
        "attribution_graph",
        config=planned.config(),
        model={"name": planned.model.name, **planned.model.provenance()},
        prompts=[{"text": prompt}],
        execute=lambda units, progress: execute(planned, units=units, progress=progress),
        page=write_attribution_graph,
        options=KeepOptions(out=out, store=store, html=html),
        unit="graphs",
    )
    shown = viewer_graph(kept.outcome, scan=planned.model.name, n_layers=planned.model.n_layers)
    write_json(kept.run_dir / "graph.json", shown)
    if json:
        emit_json(kept.to_dict())
        return
    summary, screen = kept.outcome.summary, console()
    nodes = kept.outcome.tables["nodes"]
    screen.print(
        f"{nodes.height} nodes, {kept.outcome.tables['edges'].height} edges; "
        f"largest residual {summary['largest_residual']:.1e}, "
        f"{summary['drawn_share_of_attribution'] or 0.0:.0%} of attribution drawn"
    )
    top = nodes.filter(kind="feature").sort("influence", descending=True).head(10)
    for row in top.iter_rows(named=True):
        line = (
            f"layer {row['layer']} feature {row['feature_id']} at {row['position']} "
            f"“{row['token']}”  influence {row['influence']:.3f}"
        )
        screen.print(line, markup=False, highlight=False)
    screen.print(f"files: {kept.run_dir}", markup=False, soft_wrap=True)
    if kept.report:
        screen.print(f"page: {kept.report}", markup=False, soft_wrap=True)
