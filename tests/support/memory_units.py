"""A store of work units in memory, which can be killed."""

from __future__ import annotations

from typing import Any

import polars as pl


class Units:
    """Keeps units in a dict; after `dies_after` of them the process is "killed"."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.kept: dict[str, tuple[pl.DataFrame, dict[str, Any]]] = {}
        self.dies_after = dies_after
        self.written = 0

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any]] | None:
        """Return a kept unit, or None."""
        return self.kept.get(key)

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        """Keep a unit, or die."""
        if self.dies_after is not None and self.written == self.dies_after:
            raise KeyboardInterrupt
        self.kept[key] = (frame, payload)
        self.written += 1
