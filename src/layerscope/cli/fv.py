"""``layerscope fv``: which heads carry a task, and what their vector does without examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import (
    DEFAULT_FOLDER,
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    ModelArgument,
    OutOption,
    StoreOption,
    console,
    emit_json,
    numbers,
    say_files,
    say_warnings,
)

if TYPE_CHECKING:
    from layerscope.interventions.function_vectors.tasks import Layout, Task


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def fv(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        task: Annotated[
            str,
            typer.Option(
                "--task", help="JSON, YAML or CSV file of input and output; or demo:NAME."
            ),
        ],
        shots: Annotated[int, typer.Option("--shots", help="Examples before a query.")] = 8,
        prompts: Annotated[
            int, typer.Option("--prompts", help="Prompts in which effects are measured.")
        ] = 25,
        trials: Annotated[int, typer.Option("--trials", help="Most test queries.")] = 50,
        heads: Annotated[
            str, typer.Option("--heads", help="Sizes of the head set to choose from.")
        ] = "1,2,5,10,20",
        corruption: Annotated[
            str,
            typer.Option(
                "--corruption",
                help="Prompts that do not show the task: shuffled, zero_shot, or auto.",
            ),
        ] = "auto",
        layout: Annotated[
            str | None,
            typer.Option(
                "--layout",
                help="Three texts around input and answer, split by |, such as 'Q: |\\nA:|\\n\\n'.",
            ),
        ] = None,
        text: Annotated[
            list[str] | None,
            typer.Option(
                "--text",
                help="Sentence with {input}, such as 'The opposite of {input} is', in which the "
                "vector is tried as well; may be repeated.",
            ),
        ] = None,
        band: Annotated[
            str,
            typer.Option(
                "--band", help="Zero-shot accuracy, least and largest, that allows a claim."
            ),
        ] = "0,0.5",
        seed: Annotated[int, typer.Option("--seed", help="Of every draw.")] = 0,
        save: Annotated[
            Path | None, typer.Option("--save", help="Folder for the vector, to steer with.")
        ] = None,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find the heads that carry a task (function vectors, Todd et al. 2024).

        Measures every head's average indirect effect, sums the outputs of the top heads into a
        vector, and adds it to prompts without examples: beside no vector and random heads.

        - `layerscope fv ./my-model --task antonym.json`
        - `layerscope fv DEMO --task demo:spanish` with the embedded model
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.function_vectors import FunctionVectorConfig
        from layerscope.experiments.function_vectors.run import NAME, execute, plan
        from layerscope.models import load
        from layerscope.reports.function_vectors import write_function_vectors

        asked, layout_of = _task(task), _layout(task, layout)
        config = FunctionVectorConfig(
            shots=shots,
            prompts=prompts,
            trials=trials,
            heads=_sizes(heads),
            corruption=corruption,  # type: ignore[arg-type]
            layout=layout_of,
            texts=tuple(text or ()),
            transfer_band=_band(band),
            seed=seed,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        planned = plan(opened, asked, config)
        kept = keep(
            NAME,
            config=config.to_dict(),
            model={"name": opened.name, **opened.provenance()},
            prompts=[
                {"key": word, "prompt": word, "answer": answer} for word, answer in asked.pairs
            ],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_function_vectors,
            options=KeepOptions(out=out, store=store, html=html),
            unit="layers",
        )
        if save is not None:
            _save(opened, kept.outcome, save)
        if as_json:
            emit_json(kept.to_dict())
        else:
            _show(kept.outcome.summary, kept.report or kept.run_dir)


def _task(name: str) -> Task:
    from layerscope.experiments.function_vectors.builtin import PREFIX, demo_task
    from layerscope.interventions.function_vectors.tasks import read_task

    if name.startswith(PREFIX):
        return demo_task(name.removeprefix(PREFIX))
    return read_task(name)


def _layout(task: str, given: str | None) -> Layout:
    from layerscope.errors import ConfigError
    from layerscope.experiments.function_vectors.builtin import PREFIX, demo_layout
    from layerscope.interventions.function_vectors.tasks import Layout

    if given is None:
        return demo_layout() if task.startswith(PREFIX) else Layout()
    parts = given.replace("\\n", "\n").split("|")
    if len(parts) != 3:
        raise ConfigError(
            f"a layout has three texts split by |, not {len(parts)}: before|between|after"
        )
    return Layout(*parts)


def _band(text: str) -> tuple[float, float]:
    from layerscope.errors import ConfigError

    found = numbers(text, "--band")
    if len(found) != 2:
        raise ConfigError(f"--band takes two accuracies, such as 0,0.5, not {text!r}")
    return found[0], found[1]


def _sizes(text: str) -> tuple[int, ...]:
    from layerscope.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--heads takes numbers split by commas, not {text!r}") from None


def _save(model: Any, outcome: Any, folder: Path) -> None:
    import torch

    from layerscope.interventions.steering.vector import SteeringVector, save_vector

    summary = outcome.summary
    vector = SteeringVector(
        f"resid_post.{summary['chosen']['layer']}",
        torch.tensor(outcome.tables["vector"]["value"].to_list(), dtype=torch.float32),
        method="function_vector",
        details={"task": summary["task"], **summary["chosen"]},
    )
    save_vector(vector, folder, model)


def _show(summary: dict[str, Any], where: Path) -> None:
    from rich.table import Table

    screen = console()
    chosen = summary["chosen"]
    heads = ", ".join(f"{layer}.{head}" for layer, head in chosen["heads"])
    screen.print(
        f"{summary['task']}: heads {heads} added after block {chosen['layer']}; top-1 on "
        f"{summary['test_queries']} test queries",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table()
    for name in ("prompt", "no vector", "vector", "random heads", "heads in place"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for setting, values in summary["test_top1"].items():
        keys = ("none", "vector", "random_mean", "in_place")
        cells = ["" if values.get(key) is None else f"{values[key]:.0%}" for key in keys]
        table.add_row(setting.replace("_", " "), *cells)
    for row in summary["texts"]:
        shares = (row["none"], row["vector"], row["random_mean"])
        table.add_row(row["text"], *("" if share is None else f"{share:.0%}" for share in shares))
    screen.print(table)
    transfer = summary["transfer"]
    screen.print(
        f"transfer {transfer['verdict']}: {transfer['reason']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    say_warnings(summary["warnings"])
    say_files([where])
