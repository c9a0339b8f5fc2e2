"""The runs database: what was run, on what, with what result, and where its files are.

    with Store.open("layerscope-runs/layerscope.db") as store:
        folder = open_run_dir(Path("layerscope-runs"), key=sweep_key)   # <out>/run-latest
        with store.start(config=..., model=..., prompts=..., out_dir=folder.path) as run:
            for key, piece in pieces:
                done = run.get_unit(key)                                # (frame, payload) | None
                if done is None:
                    run.put_unit(key, frame, payload)
            run.add_artifact("table", path)
            run.save_result("summary", summary)
            run.finish(provenance)
            run.cleanup_units()
        close_run_dir(folder.path)

A long run is a list of idempotent work units. Each unit's file is on disk before the database
knows of it, and the database records it in one transaction, so a process that is killed at any
moment repeats at most one unit and ends with the same bytes. SQLite (WAL) is the default; any URL
that SQLAlchemy understands works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope.store.handle import RunHandle, content_key
    from layerscope.store.info import RunInfo
    from layerscope.store.rundir import RunDir, close_run_dir, open_run_dir
    from layerscope.store.store import Store, byte_versions

DEFAULT_STORE = "layerscope-runs/layerscope.db"

_HOMES = {
    "RunDir": "layerscope.store.rundir",
    "RunHandle": "layerscope.store.handle",
    "RunInfo": "layerscope.store.info",
    "Store": "layerscope.store.store",
    "byte_versions": "layerscope.store.store",
    "close_run_dir": "layerscope.store.rundir",
    "content_key": "layerscope.store.handle",
    "open_run_dir": "layerscope.store.rundir",
}

__all__ = [
    "DEFAULT_STORE",
    "RunDir",
    "RunHandle",
    "RunInfo",
    "Store",
    "byte_versions",
    "close_run_dir",
    "content_key",
    "open_run_dir",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: the command line reads DEFAULT_STORE only."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'layerscope.store' has no attribute {name!r}")
