"""Build the reference.

docs/cli.md comes from the commands' own help, docs/families.md from the survey that the tests run
on every class of models, docs/site/ from the docstrings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent


def cli_reference() -> str:
    """Return the manual of every command as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from layerscope.cli.app import build

    command = typer.main.get_command(build())
    context = typer.Context(command, info_name="layerscope")
    text = get_docs_for_click(obj=command, ctx=context, name="layerscope")
    return "\n".join(line.rstrip() for line in text.replace("\b", "").splitlines()) + "\n"


def families() -> str:
    """Return the table of model families as Markdown."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from support.survey import EVERYTHING, family_table, survey

    return family_table([survey(key) for key in EVERYTHING])


def site() -> Path:
    """Write the reference of the library, and return its first page."""
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(DOCS / "site")]
    subprocess.run([*command, "layerscope"], check=True)
    return DOCS / "site" / "index.html"


def _written(name: str, text: str) -> Path:
    path = DOCS / name
    path.write_text(text, encoding="utf-8")
    return path


PARTS: dict[str, Callable[[], Path]] = {
    "families": lambda: _written("families.md", families()),
    "cli": lambda: _written("cli.md", cli_reference()),
    "site": site,
}


def main() -> None:
    """Write the references that were asked for, all of them by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}. Default: all of them."
    )
    asked = parser.parse_args().parts
    for name in asked:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; use {', '.join(PARTS)}")
    for name in asked or PARTS:
        print(PARTS[name]())  # noqa: T201


if __name__ == "__main__":
    main()
