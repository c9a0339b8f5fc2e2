"""Trained models and published tables that live outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]


def shared_path(*parts: str) -> Path:
    """Return a path in the shared folder, or skip the test with the reason when it is absent."""
    root = Path(os.environ.get("LAYERSCOPE_SHARED", _REPOSITORY.parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent; set LAYERSCOPE_SHARED to the folder that holds it")
    return path
