"""Where a result comes from: versions, machine, commit, timings and peak memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("layerscope", "torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a number is."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout that layerscope runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Return what the run's machine is, without names of hosts or users."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda_version": torch.version.cuda,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@dataclass
class Stopwatch:
    """Named wall-clock sections in seconds, and when the whole began (UTC)."""

    started: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    seconds: dict[str, float] = field(default_factory=lambda: {})
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Add the time since the previous lap to section `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def to_dict(self) -> dict[str, Any]:
        """Return the sections, rounded to milliseconds."""
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return {"started": self.started, "seconds": rounded}
