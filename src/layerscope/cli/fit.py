"""``layerscope fit``: what a model needs in memory, and where it fits; `fit_lens` has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from layerscope.cli import fit_lens
from layerscope.cli.common import DeviceOption, DtypeOption, JsonOption, console, emit_json

if TYPE_CHECKING:
    from rich.table import Table

HELP = """Say what a model needs in memory and where it fits; or fit a lens to a model.

`layerscope fit MODEL` is short for `layerscope fit memory MODEL`.
"""

MEMORY_HELP = """Estimate the memory of a model from its config.json and the headers of its files.

No weight is read. Counted are the weights in every format (a tied unembedding once, experts in all
and per token), keys and values, activations with every residual kept, and the readout's tiles, held
against what is free on each device now. A hub id that is neither cached nor reachable is estimated
by its name.

- `layerscope fit ./my-model --batch 8 --positions 2048`
- `layerscope fit Qwen/Qwen2.5-0.5B --device cpu --json`

Exit code 0 when it fits somewhere, 2 when it does not (with what would).
"""

DEFAULT = "memory"
DEFAULT_POSITIONS = 2048


class DefaultGroup(TyperGroup):
    """A group whose first word may be left out: what is no subcommand goes to the default one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default subcommand in front of words that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    group = typer.Typer(cls=DefaultGroup, no_args_is_help=True, rich_markup_mode="markdown")
    group.command(DEFAULT, help=MEMORY_HELP)(memory)
    fit_lens.register(group)
    app.add_typer(group, name="fit", help=HELP)


def memory(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face id, local folder, or only a name.")
    ],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts run at once.")] = 1,
    positions: Annotated[
        int | None,
        typer.Option(
            "--positions",
            min=1,
            help=f"Tokens of a prompt. Default: {DEFAULT_POSITIONS}, at most the model's context.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Estimate, print, and say whether it fits."""
    from layerscope.errors import ConfigError
    from layerscope.models.backends.huggingface.lookup import find_sizes
    from layerscope.models.memory import Workload
    from layerscope.models.memory.report import FitReport

    sizes = find_sizes(model, revision=revision)
    if positions is not None and sizes.n_ctx is not None and positions > sizes.n_ctx:
        raise ConfigError(
            f"--positions {positions} is beyond the context of {model}, {sizes.n_ctx} tokens"
        )
    if positions is None:
        positions = min(DEFAULT_POSITIONS, sizes.n_ctx or DEFAULT_POSITIONS)
    report = FitReport.of(sizes, Workload(batch, positions), device=device, dtype=dtype)
    if as_json:
        emit_json(report.to_dict())
    else:
        _show(report)
    return 0 if report.recommended is not None else 2


def _show(report: Any) -> None:
    from rich.markup import escape

    out = console()
    for line in report.summary():
        out.print(escape(line), soft_wrap=True, highlight=False)
    out.print(_needs(report))
    out.print(_devices(report))
    for line in report.advice():
        out.print(escape(line), soft_wrap=True, highlight=False)


def _needs(report: Any) -> Table:
    from rich.table import Table

    from layerscope.models.memory import show_bytes

    workload = report.workload
    table = Table(
        title=f"needed for {workload.batch} x {workload.positions} tokens", title_justify="left"
    )
    table.add_column("format")
    for heading in ("weights", "keys, values", "activations", "readout", "slack", "in all"):
        table.add_column(heading, justify="right")
    for device in report.devices:
        table.add_column(device.name)
    for row in report.rows:
        need = row[0].estimate
        parts = (need.weights, need.cache, need.activations, need.readout, need.slack, need.total)
        cells = ["unknown" if part is None else show_bytes(part) for part in parts]
        verdicts = [_VERDICTS[found.verdict] if found.offered else "-" for found in row]
        table.add_row(need.format.name, *cells, *verdicts)
    return table


def _devices(report: Any) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from layerscope.models.devices import dtype_name
    from layerscope.models.memory import show_bytes

    table = Table(title="devices", title_justify="left")
    for heading in ("device", "free", "of", "runs"):
        table.add_column(heading, justify="right" if heading in ("free", "of") else "left")
    for device in report.devices:
        table.add_row(
            escape(f"{device.name} {device.title}".strip()),
            show_bytes(device.free),
            show_bytes(device.total),
            dtype_name(device.dtype),
        )
    return table


_VERDICTS = {"fits": "[green]fits[/]", "tight": "[yellow]tight[/]", "no": "[red]no[/]"}
