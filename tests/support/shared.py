"""Where material that is not part of the repository lies, and how to skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_path(*parts: str) -> Path:
    """Return a path under LAYERSCOPE_SHARED (default: `shared` beside the repository), or skip."""
    root = Path(os.environ.get("LAYERSCOPE_SHARED", str(REPOSITORY.parent / "shared")))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent; set LAYERSCOPE_SHARED to the folder that holds it")
    return path
