"""A small complete run that can be killed at any of its steps; used by the crash tests.

Every call that changes the disk or the database counts as two steps, one before and one after it.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from sqlalchemy import Engine, event

from layerscope import files
from layerscope.store import Store, close_run_dir, open_run_dir

N_UNITS = 4


def frame(index: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "unit": [index] * 3,
            "value": [index / 7, None, float(index)],
            "tokens": [["a", "⟨NEXT⟩"], [], None],
        },
        schema={"unit": pl.Int32, "value": pl.Float64, "tokens": pl.List(pl.String)},
    )


def run(root: Path) -> None:
    """Do the whole run; `root/computed.log` says which units were computed."""
    arguments: dict[str, Any] = {
        "config": {"norm": "final"},
        "model": {"name": "org/model", "weights": "abc"},
        "prompts": [{"text": f"prompt {index}"} for index in range(N_UNITS)],
    }
    with Store.open(root / "runs.db") as store:
        folder = open_run_dir(root / "out", key="key")
        start = store.start(
            **arguments, out_dir=folder.path, versions={}, reuse_finished=folder.resumed
        )
        with start as handle:
            if not handle.finished:
                pieces: list[pl.DataFrame] = []
                for index in range(N_UNITS):
                    done = handle.get_unit(f"unit/{index}")
                    if done is None:
                        with (root / "computed.log").open("a") as log:
                            log.write(f"{index}\n")
                        handle.put_unit(f"unit/{index}", frame(index), {"index": index})
                        done = frame(index), {"index": index}
                    assert done[1] == {"index": index}
                    pieces.append(done[0])
                table = folder.path / "table.parquet"
                with files.atomic_path(table) as temporary:
                    pl.concat(pieces).write_parquet(temporary)
                handle.add_artifact("table", table)
                handle.save_result("summary", {"passes": []})
                handle.finish({"versions": {}})
            handle.cleanup_units()
        close_run_dir(folder.path)


def run_and_die(root: Path, step: int) -> None:
    """Do the run in this process and kill it at the given step; exits 0 if it has fewer."""
    left = step

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return wrapper

    write_parquet = pl.DataFrame.write_parquet

    def half_first(frame: pl.DataFrame, path: Path, **options: Any) -> None:
        whole = io.BytesIO()
        write_parquet(frame, whole, **options)
        path.write_bytes(whole.getvalue()[: whole.tell() // 2])
        tick()
        path.write_bytes(whole.getvalue())

    pl.DataFrame.write_parquet = half_first  # type: ignore[assignment,method-assign]
    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "unlink"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (Path, "rmdir"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    event.listen(Engine, "begin", lambda _connection: tick())
    event.listen(Engine, "before_cursor_execute", lambda *_args: tick())
    event.listen(Engine, "commit", lambda _connection: tick())
    run(root)
