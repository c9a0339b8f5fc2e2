from __future__ import annotations

import subprocess
import sys

import pytest

from layerscope import __version__
from layerscope.cli.app import COMMANDS, run

HEAVY = ("torch", "transformers", "polars", "sqlalchemy", "plotly", "numpy")


def loaded_after(code: str) -> set[str]:
    """Names of heavy packages that a fresh interpreter has loaded after running `code`."""
    script = (
        f"{code}\nimport sys\nprint([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(eval(done.stderr.strip().splitlines()[-1]))


def test_importing_the_package_is_cheap() -> None:
    assert loaded_after("import layerscope") == set()


# Modules are named with an underscore where a command has a hyphen.
NAMES = [name.replace("_", "-") for name in COMMANDS]


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in NAMES)])
def test_help_is_cheap(words: list[str]) -> None:
    assert loaded_after(f"from layerscope.cli.app import run\nassert run({words!r}) == 0") == set()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert name in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"layerscope {__version__}"


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["leyers"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unexpected_errors_are_one_line_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import layerscope.cli.app as app

    def broken() -> None:
        raise RuntimeError("something\nodd")

    monkeypatch.setattr(app, "build", broken)
    assert run(["layers"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: unexpected RuntimeError: something odd (run again with --debug to see where)\n"
    )


def test_full_disk_has_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import layerscope.cli.app as app

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(app, "build", full)
    assert run(["layers"]) == 2
    assert "no space left" in capsys.readouterr().err
