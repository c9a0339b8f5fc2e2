"""``layerscope demo``: the main job on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerscope.cli.common import DEFAULT_FOLDER, JsonOption

HELP = """Run the layers experiment on the model that ships inside layerscope, in seconds.

The embedded model is a small Llama-style language model that was trained on generated text about
countries, word tasks, reviews and stories. It knows the built-in suite's capitals, though it never
saw them in the suite's wording.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", help=HELP)(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder that holds run-latest.")] = (
        DEFAULT_FOLDER
    ),
    as_json: JsonOption = False,
) -> int:
    """Run the built-in suite on the embedded model and show what came out."""
    from layerscope.cli.layers import show
    from layerscope.cli.sweep import SweepOptions, run_sweep
    from layerscope.demo import model_path
    from layerscope.experiments.layers import LayersConfig, PromptSet

    sweep = run_sweep(
        [str(model_path())],
        PromptSet.builtin(),
        LayersConfig(diagnostics="standard"),
        SweepOptions(out=out),
    )
    show(sweep, as_json=as_json)
    return 0
