"""The command line: ``layerscope COMMAND``; one module per command, loaded only when needed."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    from layerscope.cli.app import run

    raise SystemExit(run())
