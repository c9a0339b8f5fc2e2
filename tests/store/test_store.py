from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import sqlite3
import threading
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sqlalchemy.exc import OperationalError

from layerscope import files
from layerscope.errors import OutputError, StoreError
from layerscope.files import sha256_file
from layerscope.store import RunHandle, Store, content_key, open_run_dir
from layerscope.store.handle import UNITS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "db" / "runs.db", clock=ticking()) as opened:
        yield opened


def ticking() -> Any:
    times = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(10_000))
    return lambda: next(times)


def start(store: Store, out: Path, **changes: Any) -> RunHandle:
    arguments: dict[str, Any] = {
        "config": {"norm": "final", "lenses": ("raw", "norm")},
        "model": {"name": "org/tiny", "weights": "abc"},
        "prompts": [{"text": "a"}, {"text": "b"}],
        "versions": {"torch": "1"},
    }
    return store.start(**(arguments | changes), out_dir=out)


FRAME = pl.DataFrame(
    {"layer": [0, 1], "p": [0.5, None], "ids": [[1, 2], None]},
    schema={"layer": pl.Int32, "p": pl.Float64, "ids": pl.List(pl.Int32)},
)


# -- units ----------------------------------------------------------------------------------------


def test_a_unit_comes_back_as_it_was_put(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    payload = {"text": "→ \ud83d\ude00"[:2], "values": [1, 0.1, None], "nan": float("nan")}
    run.put_unit("a/b:0", FRAME, payload)
    found = run.get_unit("a/b:0")
    assert found is not None
    frame, kept = found
    assert frame.equals(FRAME, null_equal=True) and frame.schema == FRAME.schema
    assert kept is not None and math.isnan(kept.pop("nan"))
    assert kept == {"text": "→ ", "values": [1, 0.1, None]}
    assert run.get_unit("other") is None and run.unit_meta("other") is None
    assert run.units_done() == ["a/b:0"]


def test_a_unit_put_twice_is_one_unit(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    run.put_unit("u", FRAME)
    (first,) = (run.dir / UNITS / run.id).iterdir()
    digest = sha256_file(first)
    run.put_unit("u", FRAME)
    assert sha256_file(first) == digest, "the same content must give the same bytes"
    run.put_unit("u", FRAME.head(1), {"n": 1})
    assert run.units_done() == ["u"]
    assert run.unit_meta("u") == {"n": 1}
    found = run.get_unit("u")
    assert found is not None and found[0].height == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_a_damaged_unit_counts_as_not_done(store: Store, tmp_path: Path, damage: str) -> None:
    run = start(store, tmp_path / "out")
    run.put_unit("u", FRAME)
    (path,) = (run.dir / UNITS / run.id).iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        FRAME.head(1).write_parquet(path)
    assert run.get_unit("u") is None
    assert run.unit_meta("u") is None
    run.put_unit("u", FRAME)
    assert run.get_unit("u") is not None


def test_a_full_disk_leaves_no_trace_of_the_unit(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(store, tmp_path / "out")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OutputError, match="no space left writing"):
            run.put_unit("u", FRAME)
    assert run.get_unit("u") is None and run.units_done() == []
    assert list((run.dir / UNITS / run.id).iterdir()) == []


def test_units_are_removed_only_after_the_run_is_finished(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    run.put_unit("u", FRAME)
    with pytest.raises(StoreError, match=r"not finished; call finish\(\)"):
        run.cleanup_units()
    run.finish({})
    run.cleanup_units()
    assert not (run.dir / UNITS).exists()
    assert store.run(run.id).n_units == 0


# -- resuming -------------------------------------------------------------------------------------


def test_an_unfinished_run_is_resumed_and_a_finished_one_is_not(
    store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start(store, out)
    first.put_unit("u", FRAME)
    again = start(store, out)
    assert (again.id, again.resumed) == (first.id, True)
    assert again.get_unit("u") is not None
    again.finish({"seed": 1})
    new = start(store, out)
    assert new.id != first.id and not new.resumed and new.get_unit("u") is None
    assert store.run(first.id).attempts == 2


def test_what_a_killed_process_left_is_removed_when_its_run_goes_on(
    store: Store, tmp_path: Path
) -> None:
    run = start(store, tmp_path / "out")
    run.put_unit("u", FRAME)
    folder = run.dir / UNITS / run.id
    left = folder / ".x.parquet.999999999-abc.layerscope-tmp"
    left.write_text("half")
    assert start(store, tmp_path / "out").get_unit("u") is not None
    assert not left.exists() and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"norm": "next_norm"}},
        {"model": {"name": "org/tiny", "weights": "other"}},
        {"prompts": [{"text": "b"}, {"text": "a"}]},
        {"versions": {"torch": "2"}},
        {"experiment": "steering"},
    ],
)
def test_other_content_is_another_run(store: Store, tmp_path: Path, change: Any) -> None:
    first = start(store, tmp_path / "out")
    other = start(store, tmp_path / "out", **change)
    assert not other.resumed and other.id != first.id and other.key != first.key


def test_another_folder_is_another_run(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path / "out")
    assert start(store, tmp_path / "out2").id != first.id


def test_the_key_is_that_of_the_content() -> None:
    arguments: dict[str, Any] = {"experiment": "e", "prompts": [], "versions": {}}
    one = content_key(config={"a": 1, "b": (2,)}, model={"x": 1}, **arguments)
    assert one == content_key(config={"b": [2], "a": 1}, model={"x": 1}, **arguments)
    assert one != content_key(config={"a": 1, "b": [2]}, model={"x": 2}, **arguments)


def test_a_finished_run_of_the_same_folder_can_be_used_again(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_dir = open_run_dir(out, key="k")
    run = start(store, run_dir.path)
    table = files.write_text(run.dir / "t.parquet", "rows")
    run.add_artifact("table", table)
    run.finish({})
    again = start(store, run_dir.path, reuse_finished=True)
    assert (again.id, again.finished, again.resumed) == (run.id, True, True)
    assert again.artifact("table") == table
    table.write_text("changed")
    assert again.artifact("table") is None and again.artifact("none") is None
    open_run_dir(out, key="other")  # rotates it away
    assert not start(store, run_dir.path, reuse_finished=True).finished


def test_finished_units_follow_a_run_out_of_a_rotated_folder(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start(store, open_run_dir(out, key="a").path)
    run.put_unit("u", FRAME)
    open_run_dir(out, key="b")
    again = start(store, open_run_dir(out, key="a").path)
    assert again.resumed and again.id == run.id
    assert again.get_unit("u") is not None
    assert store.run(run.id).dir == str(out / "run-latest")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("bad"), "failed", "ValueError: bad"),
        (KeyboardInterrupt(), "interrupted", None),
        (None, "interrupted", None),
    ],
)
def test_how_a_block_ended_is_recorded(
    store: Store, tmp_path: Path, error: BaseException | None, status: str, text: str | None
) -> None:
    def body() -> None:
        with start(store, tmp_path / "out"):
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    info = store.run("latest")
    assert (info.status, info.error) == (status, text)
    assert start(store, tmp_path / "out").resumed
    assert store.run("latest").error is None


# -- other processes ------------------------------------------------------------------------------


def hold(root: Path, pipe: Connection) -> None:
    with Store.open(root / "db" / "runs.db") as store:
        run = start(store, root / "out")
        pipe.send(run.id)
        pipe.recv()


def test_a_run_of_a_live_process_is_refused_and_of_a_dead_one_resumed(
    store: Store, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, there))
    process.start()
    try:
        run_id = here.recv()
        with pytest.raises(StoreError, match=rf"executed by process {process.pid}; wait"):
            start(store, tmp_path / "out")
        with pytest.raises(StoreError, match="is being executed"):
            store.delete(run_id)
        assert store.run(run_id).status == "running"
    finally:
        process.kill()
        process.join()
    assert store.run(run_id).status == "interrupted"
    assert [run.id for run in store.runs(status="interrupted")] == [run_id]
    resumed = start(store, tmp_path / "out")
    assert resumed.resumed and resumed.id == run_id


def test_a_process_id_that_was_used_again_does_not_block(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    with sqlite3.connect(tmp_path / "db" / "runs.db") as connection:
        connection.execute("UPDATE runs SET pid = ?, process_started = 1.0", (os.getppid(),))
    connection.close()
    assert store.run(run.id).status == "interrupted"
    assert start(store, tmp_path / "out").id == run.id


def test_many_writers_at_once_lose_nothing(store: Store, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with Store.open(tmp_path / "db" / "runs.db") as own:
                run = start(own, tmp_path / f"out{number}", config={"number": number})
                for index in range(8):
                    run.put_unit(f"u{index}", FRAME, {"number": number})
                run.finish({})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    runs = store.runs()
    assert len(runs) == 5
    assert all(run.n_units == 8 and run.status == "finished" for run in runs)


# -- the database ---------------------------------------------------------------------------------


def test_a_locked_database_is_one_line_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store.open(path, busy_timeout_s=0.01) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another program; wait") as caught:
            start(store, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert store.runs() == []  # readers do not wait for a writer
        other.execute("ROLLBACK")
        other.close()
        start(store, tmp_path / "out")


@pytest.mark.parametrize("content", [b"this is not a database, not at all" * 40, b"\x00" * 4096])
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged or not a runs database; restore") as caught:
        Store.open(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store.open(path) as store:
        start(store, tmp_path / "out")
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"), Store.open(path) as store:
        store.runs()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    Store.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE store_info SET value = '99' WHERE name = 'schema_version'")
    connection.close()
    with pytest.raises(StoreError, match=r"newer layerscope \(schema 99.*upgrade layerscope"):
        Store.open(path)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (x)")
    connection.close()
    with pytest.raises(StoreError, match="another program"):
        Store.open(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://x", "no driver for nonsense"),
        ("://", "not a database URL"),
        ("sqlite:////proc/nowhere/runs.db", "cannot create the folder"),
    ],
)
def test_a_bad_url_is_one_line(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store.open(url)


def test_a_full_disk_of_the_database_is_an_output_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(store, tmp_path / "out")

    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr("sqlalchemy.orm.Session.flush", full)
    with pytest.raises(OutputError, match="no space left writing"):
        run.save_result("summary", {})


def test_pragmas(store: Store, tmp_path: Path) -> None:
    start(store, tmp_path / "out")
    with store._database.reading() as session:
        connection = session.connection()
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 10_000


# -- finding, results, comparing, taking away -----------------------------------------------------


def test_runs_are_found_by_prefix_name_and_status(store: Store, tmp_path: Path) -> None:
    first = start(store, tmp_path / "a")
    second = start(store, tmp_path / "b", model={"name": "org/Other_1"})
    second.finish({})
    assert [run.id for run in store.runs()] == [second.id, first.id]
    assert [run.id for run in store.runs(limit=1)] == [second.id]
    assert [run.id for run in store.runs(model="OTHER_1")] == [second.id]
    assert store.runs(model="OtherX1") == []
    assert [run.id for run in store.runs(status="finished")] == [second.id]
    assert store.run("latest").id == second.id
    assert store.run(first.id[:6]).id == first.id
    assert store.run(first.id).n_prompts == 2
    wrong = first.id[:-2] + "zz"
    with pytest.raises(StoreError, match=f"did you mean '{first.id}'"):
        store.run(wrong)
    with pytest.raises(StoreError, match=r"unknown status 'finishd'.*did you mean 'finished'"):
        store.runs(status="finishd")


def test_a_prefix_of_several_runs_is_refused(store: Store, tmp_path: Path) -> None:
    ids: list[str] = []
    while len({run_id[0] for run_id in ids}) == len(ids):
        ids.append(start(store, tmp_path / str(len(ids))).id)
    with pytest.raises(StoreError, match="beginning of several runs"):
        store.run(ids[-1][0])


def test_an_empty_store_says_so(store: Store) -> None:
    with pytest.raises(StoreError, match="holds no runs yet"):
        store.run("latest")


def test_results_are_kept_without_nan_and_replaced(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    run.save_result("summary", {"a": 1})
    run.save_result("summary", {"a": float("nan"), "b": [0.1]})
    assert store.result(run.id, "summary") == {"a": None, "b": [0.1]}
    with pytest.raises(StoreError, match=r"has no result 'sumary'.*did you mean 'summary'"):
        store.result(run.id, "sumary")


def summary(l_semantic: int | None, **extra: Any) -> dict[str, Any]:
    milestones = {
        "L_semantic": {"first": l_semantic, "stable": l_semantic, "lost": [], "fraction": None}
    }
    labels = {"prompt_id": "pos", "fact_key": "F", "prompt_variant": "orig", "lens": "norm"}
    passes = [{**labels, "milestones": milestones}]
    if extra:
        passes.append({**labels, **extra, "milestones": {}})
    return {"n_layers": 8, "norm_choice": "final", "passes": passes}


def test_milestones_are_compared_pass_by_pass(store: Store, tmp_path: Path) -> None:
    a = start(store, tmp_path / "a")
    b = start(store, tmp_path / "b", config={"norm": "next_norm", "lenses": ["raw", "norm"]})
    a.save_result("summary", summary(5))
    b.save_result("summary", summary(7, prompt_id="ctl"))
    found = store.compare(a.id, b.id)
    first = found["passes"][0]["milestones"]["L_semantic"]["first"]
    assert first == {"a": 5, "b": 7, "delta": 2}
    assert found["passes"][0]["milestones"]["L_semantic"]["fraction"]["delta"] is None
    assert found["config"] == [{"option": "norm", "a": "final", "b": "next_norm"}]
    assert [entry["prompt_id"] for entry in found["only_b"]] == ["ctl"]
    assert found["only_a"] == []
    json.dumps(found, allow_nan=False)


def finished_run(store: Store, out: Path) -> RunHandle:
    run = start(store, out)
    for name, text in (("a.csv", "x\n"), ("sub/b.json", "{}\n")):
        run.add_artifact("file", files.write_text(run.dir / name, text))
    run.save_result("summary", summary(3))
    run.finish({"seed": 0})
    return run


def test_an_export_holds_everything_with_hashes(store: Store, tmp_path: Path) -> None:
    run = finished_run(store, tmp_path / "out")
    outside = files.write_text(tmp_path / "elsewhere" / "a.csv", "y\n")
    run.add_artifact("file", outside)
    folder = store.export(run.id, tmp_path / "export")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {entry["name"] for entry in manifest["files"]} == {"a.csv", "a-2.csv", "sub/b.json"}
    for entry in manifest["files"]:
        assert sha256_file(folder / entry["name"]) == entry["sha256"]
    assert manifest["run"]["id"] == run.id and manifest["results"]["summary"]["n_layers"] == 8
    with zipfile.ZipFile(store.export(run.id, tmp_path / "export.zip")) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["a-2.csv", "a.csv", "manifest.json", "sub/b.json"]
    again = store.export(run.id, tmp_path / "again.zip")
    assert again.read_bytes() == (tmp_path / "export.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_export_overwrites_nothing(store: Store, tmp_path: Path) -> None:
    run = finished_run(store, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already; export to another name"):
        store.export(run.id, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_an_artifact_that_is_not_what_was_written_is_not_exported(
    store: Store, tmp_path: Path, damage: str
) -> None:
    run = finished_run(store, tmp_path / "out")
    path = run.dir / "a.csv"
    path.write_text("changed") if damage == "change" else path.unlink()
    with pytest.raises(StoreError, match=r"artifact a\.csv of run .* (was changed|is missing)"):
        store.export(run.id, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_artifacts_are_found_after_a_rotation(store: Store, tmp_path: Path) -> None:
    run_dir = open_run_dir(tmp_path / "out", key="k")
    run = finished_run(store, run_dir.path)
    rotated = open_run_dir(tmp_path / "out", key="other").rotated_to
    assert store.run(run.id).dir == str(rotated)
    assert (store.export(run.id, tmp_path / "export") / "a.csv").read_text() == "x\n"


def test_an_artifact_that_does_not_exist_is_refused(store: Store, tmp_path: Path) -> None:
    run = start(store, tmp_path / "out")
    with pytest.raises(StoreError, match="cannot be read; write it before"):
        run.add_artifact("table", run.dir / "none")


def test_a_deleted_run_leaves_its_files(store: Store, tmp_path: Path) -> None:
    run = finished_run(store, tmp_path / "out")
    store.delete(run.id)
    assert store.runs() == []
    assert (run.dir / "a.csv").exists()
    with sqlite3.connect(tmp_path / "db" / "runs.db") as connection:
        for table in ("runs", "run_prompts", "results", "artifacts", "work_units"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    connection.close()
