"""The Typer application and the one place where errors become one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from typing import Annotated

import typer

from layerscope.errors import LayerscopeError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Order of the commands in --help.
COMMANDS = (
    "demo",
    "layers",
    "battery",
    "follow_up",
    "patch",
    "path",
    "ablate",
    "back_patch",
    "trace",
    "attribute",
    "mediate",
    "heads",
    "steer",
    "fv",
    "check",
    "generate",
    "fit",
    "features",
    "pathways",
    "causal_features",
    "graph",
    "measures",
    "compare",
    "runs",
)

HELP = """Look inside language models, and know whether to believe what you see.

MODEL is a Hugging Face id or a local folder. `layerscope COMMAND --help` is a command's manual.

Exit codes: 0 done; 2 a mistake that can be repaired, one line says how (of several models or
prompts the others are finished all the same); 130 interrupted: finished work is kept, the same
command goes on.
"""


def _version(value: bool) -> None:
    if value:
        from layerscope import __version__

        typer.echo(f"layerscope {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """Assemble the application from one module per command."""
    app = typer.Typer(
        name="layerscope",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(  # pyright: ignore[reportUnusedFunction]
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
        version: Annotated[
            bool,
            typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
        ] = False,
    ) -> None:
        del debug, version  # --debug is read in run(), where errors are caught

    for name in COMMANDS:
        importlib.import_module(f"layerscope.cli.{name}").register(app)
    return app


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; errors of ours become one line on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        result = build()(words, standalone_mode=False)
    except KeyboardInterrupt:
        return _interrupted()
    except typer.Exit as stop:
        # Some versions of typer turn Ctrl-C inside a command into this exit code.
        return _interrupted() if stop.exit_code == EXIT_INTERRUPTED else stop.exit_code
    except typer.Abort:
        _say("aborted")
        return EXIT_INTERRUPTED
    except LayerscopeError as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); that is its right, not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _unexpected(error, debug=debug)
    if result == EXIT_INTERRUPTED:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    _say("interrupted; finished work is kept, run the same command to go on")
    return EXIT_INTERRUPTED


def _unexpected(error: Exception, *, debug: bool) -> int:
    """Report usage errors of the command line, a full disk, and what we did not foresee."""
    show = getattr(error, "format_message", None)
    if show is not None:  # click's usage errors: unknown option, missing argument
        _say(f"error: {show()}; see layerscope --help")
        return int(getattr(error, "exit_code", EXIT_USER_ERROR))
    if debug:
        traceback.print_exc()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _say("error: no space left on the device; free some, then run the same command to go on")
    else:
        kind = type(error).__name__
        _say(f"error: unexpected {kind}: {error} (run again with --debug to see where)")
    return EXIT_USER_ERROR


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)  # noqa: T201
