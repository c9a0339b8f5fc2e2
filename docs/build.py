"""Build the reference.

docs/cli.md comes from the commands' own help, docs/families.md from the survey that the tests run
on every class of models, docs/site/ from the docstrings.
"""

from __future__ import annotations

import subprocess
import sys
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


def main() -> None:
    """Write all references."""
    (DOCS / "families.md").write_text(families(), encoding="utf-8")
    (DOCS / "cli.md").write_text(cli_reference(), encoding="utf-8")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(DOCS / "site")]
    subprocess.run([*command, "layerscope"], check=True)
    print(f"{DOCS / 'cli.md'}\n{DOCS / 'families.md'}\n{DOCS / 'site' / 'index.html'}")  # noqa: T201


if __name__ == "__main__":
    main()
