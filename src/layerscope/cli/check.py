"""``layerscope check``: prove that layerscope understands a model, before it is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import DeviceOption, DtypeOption, console, emit_json

if TYPE_CHECKING:
    from layerscope.models import IdentityReport


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def check(  # pyright: ignore[reportUnusedFunction]
        models: Annotated[
            list[str], typer.Argument(metavar="MODEL", help="Hugging Face ids or local folders.")
        ],
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        revision: Annotated[
            str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")
        ] = None,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
        ] = False,
        as_json: Annotated[
            bool,
            typer.Option("--json", help="Machine-readable JSON on stdout, nothing else there."),
        ] = False,
    ) -> None:
        """Prove that layerscope reads a model rightly: every site it names is what it says.

        Runs a few tokens and recomputes from the weights what the sites claim: the embedding is
        what block 0 reads, the parts of every block add up to the residual stream, the norms give
        what their readers got, norm and unembedding of the last residual are the model's logits.

        - `layerscope check gpt2 ./my-model`
        - `layerscope check ./my-model --dtype bfloat16 --json`

        Exit code 0 when every identity of every model holds, 2 when one fails (with the identity,
        its error and its bound) or a model cannot be loaded.
        """
        outcomes = [
            _check(
                model,
                device=device,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            for model in models
        ]
        if as_json:
            emit_json({"models": outcomes})
        else:
            for outcome in outcomes:
                _show(outcome)
        if not all(outcome["passed"] for outcome in outcomes):
            raise typer.Exit(2)


def _check(model: str, **options: Any) -> dict[str, Any]:
    """Check one model; failing to load is an outcome too, so that the others are still checked."""
    from layerscope.errors import LayerscopeError
    from layerscope.models import load

    try:
        with console(stderr=True).status(f"checking {model}"):
            loaded = load(model, **options, verify=False)
            report: IdentityReport = loaded.check()
    except LayerscopeError as error:
        return {"model": model, "passed": False, "error": str(error), "identities": []}
    outcome: dict[str, Any] = {"model": model, **report.to_dict(), "error": None}
    try:
        report.require(loaded.name)
    except LayerscopeError as error:
        outcome["error"] = str(error)
    return outcome


def _show(outcome: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    if outcome["identities"]:
        title = f"{outcome['model']}: {outcome['family']}, {outcome['dtype']}, {outcome['device']}"
        table = Table(title=escape(title), title_justify="left")
        for heading in ("identity", "what must hold", "worst error", "bound", ""):
            table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
        for identity in outcome["identities"]:
            error = identity["error"]
            table.add_row(
                identity["name"],
                identity["statement"],
                "not finite" if error is None else f"{error:.1e}",
                f"{identity['bound']:.1e}",
                "[green]holds[/]" if identity["passed"] else f"[red]fails {identity['where']}[/]",
            )
        out.print(table)
    if outcome["error"]:
        console(stderr=True).print(f"error: {outcome['error']}", markup=False, soft_wrap=True)


_NUMBERS = ("worst error", "bound")
