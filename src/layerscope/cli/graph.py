"""``layerscope graph``: the attribution graph of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from layerscope.cli.keep import Kept

HELP = """Explain a prompt's next token by features, errors and tokens.

With transcoders, MLPs are replaced by their features; with dictionaries of the residual stream, the
stream by theirs. Attention patterns and norms are held fixed, so that every node is the sum of its
sources; the summary says by how much that fails. The strongest features are then taken out of the
real model, and what changes stands beside what the graph says. Writes nodes, edges and checks,
graph.json for the viewers of circuit-tracer and Neuronpedia, and a page.

- `layerscope graph --prompt "The capital of France is"` (the embedded model and its transcoders)
- `layerscope graph MODEL --dictionaries FOLDER --prompt "The capital of France is"`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("graph", help=HELP)(graph)


def graph(
    prompt: Annotated[
        str, typer.Option("--prompt", help="The text whose next token is explained.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Hugging Face id or local folder. Default: the embedded model."
        ),
    ] = None,
    dictionaries: Annotated[
        str | None,
        typer.Option(
            "--dictionaries",
            "--transcoders",
            help="Folder, or OWNER/REPOSITORY[/FOLDER], of transcoders or dictionaries of "
            "resid_post. Default for the embedded model: its transcoders.",
        ),
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Only the dictionary of this layer; may be repeated."),
    ] = None,
    max_features: Annotated[
        int, typer.Option("--max-features", min=1, help="Feature nodes that are expanded.")
    ] = 512,
    logits: Annotated[
        int, typer.Option("--logits", min=1, help="Next tokens that are explained, at most.")
    ] = 5,
    node_share: Annotated[
        float, typer.Option("--node-share", help="Share of influence that the kept nodes have.")
    ] = 0.8,
    edge_share: Annotated[
        float, typer.Option("--edge-share", help="Share of influence that the kept edges have.")
    ] = 0.98,
    checked: Annotated[
        int, typer.Option("--check", min=0, help="Features that are taken out of the real model.")
    ] = 24,
    products: Annotated[
        str,
        typer.Option(
            "--products",
            help="Matrix products of the sweep. checked: the fastest that is float32-accurate on "
            "this machine. default: torch as found. The run that is explained is torch's.",
        ),
    ] = "checked",
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

    name, source = _sources(model, dictionaries)
    options = GraphOptions(
        max_features=max_features,
        logits=logits,
        node_share=node_share,
        edge_share=edge_share,
        products=products,  # pyright: ignore[reportArgumentType]  # checked by the options
    )
    planned = load_quietly(
        lambda: plan(
            load(name, device=device, dtype=dtype), prompt, source, options,
            layers=layers or None, checked=checked,
        ),
        name,
    )  # fmt: skip
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
    else:
        _show(kept)


def _sources(model: str | None, dictionaries: str | None) -> tuple[str, str]:
    """Return model and dictionaries, those of the embedded model by default."""
    from layerscope.demo import model_path, transcoders_path
    from layerscope.errors import ConfigError

    name = str(model_path()) if model is None else model
    if dictionaries is not None:
        return name, dictionaries
    if Path(name).resolve() != model_path():
        raise ConfigError(
            f"no dictionaries are known for {name}: give --dictionaries FOLDER, or train some with "
            f"layerscope features train {name} --transcoder --text TEXT"
        )
    return name, str(transcoders_path())


def _show(kept: Kept) -> None:
    summary, screen = kept.outcome.summary, console()
    nodes, edges = kept.outcome.tables["nodes"], kept.outcome.tables["edges"]
    screen.print(
        f"{nodes.height} nodes, {edges.height} edges of {summary['basis']}; largest residual "
        f"{summary['largest_residual']:.1e}, replacement score {summary['replacement_score']:.2f}, "
        f"{summary['drawn_share_of_influence']:.0%} of influence drawn",
        highlight=False,
        soft_wrap=True,
    )
    edge, logit = summary["checks"]["edge"], summary["checks"]["logit"]
    if edge["n"]:
        screen.print(
            f"checked in the model: {edge['n']} edges, {edge['sign_agreement']:.0%} of signs "
            f"right, slope {edge['slope']:.2f}; {logit['n']} effects on the logit, "
            f"{logit['sign_agreement']:.0%} of signs right, slope {logit['slope']:.2f}",
            highlight=False,
            soft_wrap=True,
        )
    top = nodes.filter(kind="feature").sort("influence", descending=True).head(10)
    for row in top.iter_rows(named=True):
        line = (
            f"layer {row['layer']} feature {row['feature_id']} at {row['position']} "
            f"“{row['token']}”  influence {row['influence']:.3f}  raises {row['promotes']}"
        )
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    screen.print(f"files: {kept.run_dir}", markup=False, soft_wrap=True)
    if kept.report:
        screen.print(f"page: {kept.report}", markup=False, soft_wrap=True)
