from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from layerscope.errors import OutputError
from layerscope.store import close_run_dir, open_run_dir
from layerscope.store.owner import Owner
from layerscope.store.rundir import LATEST, MARKER, identify, locate, read_marker

NOON = datetime(2026, 11, 21, 12, 0, 5)


def visible(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def test_the_first_run_makes_the_folder_and_its_timestamp(tmp_path: Path) -> None:
    run = open_run_dir(tmp_path / "a" / "out", key="k", clock=lambda: NOON)
    assert run.path == tmp_path / "a" / "out" / LATEST
    assert not run.resumed and run.rotated_to is None
    assert visible(run.path) == ["timestamp-20261121-1200"]
    text = (run.path / "timestamp-20261121-1200").read_text()
    assert text == "Experiment started: 2026-11-21 12:00:05\n"


def test_a_finished_run_is_rotated_under_its_own_stamp(tmp_path: Path) -> None:
    first = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    (first.path / "result").write_text("1")
    close_run_dir(first.path)
    later = datetime(2026, 11, 22, 8, 30)
    second = open_run_dir(tmp_path, key="k", clock=lambda: later)
    assert second.rotated_to == tmp_path / "run-20261121-120005"
    assert (tmp_path / "run-20261121-120005" / "result").read_text() == "1"
    assert visible(second.path) == ["timestamp-20261122-0830"]


def test_runs_of_the_same_second_keep_apart(tmp_path: Path) -> None:
    for number in range(4):
        run = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
        (run.path / "result").write_text(str(number))
        close_run_dir(run.path)
    names = ["run-20261121-120005", "run-20261121-120005-2", "run-20261121-120005-3", LATEST]
    assert visible(tmp_path) == sorted(names)
    assert [(tmp_path / name / "result").read_text() for name in names] == ["0", "1", "2", "3"]


def test_an_unfinished_run_of_the_same_content_is_continued(tmp_path: Path) -> None:
    first = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    (first.path / "part").write_text("1")
    again = open_run_dir(tmp_path, key="k", clock=lambda: datetime(2026, 11, 22))
    assert again.resumed and again.id == first.id and again.rotated_to is None
    assert visible(again.path) == ["part", "timestamp-20261121-1200"]


def test_an_unfinished_run_of_other_content_makes_room(tmp_path: Path) -> None:
    first = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    other = open_run_dir(tmp_path, key="other", clock=lambda: NOON)
    assert not other.resumed and other.rotated_to == tmp_path / "run-20261121-120005"
    assert locate(first.path, first.id) == other.rotated_to
    assert locate(first.path, other.id) == other.path
    assert locate(first.path, "unknown") is None
    assert locate(tmp_path / "no" / "where", first.id) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "run-20261121-120005-rotated"),
        (["timestamp-20251016-0726"], "run-20251016-0726"),
        (["timestamp-20251016-0726", "timestamp-20251017-0101"], "run-20251017-0101"),
        (["timestamp-20251016-0726", "timestamp-nonsense"], "run-20251016-0726"),
        (["timestamp-", "timestamp-../../x".replace("/", "_")], "run-20261121-120005-rotated"),
    ],
)
def test_a_folder_of_the_earlier_system_is_rotated(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    (tmp_path / LATEST).mkdir()
    for name in names:
        (tmp_path / LATEST / name).write_text("")
    (tmp_path / LATEST / "old.csv").write_text("old")
    run = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    assert run.rotated_to == tmp_path / expected
    assert (tmp_path / expected / "old.csv").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "dangling link", "link"])
def test_something_that_is_no_folder_is_rotated_and_kept(tmp_path: Path, kind: str) -> None:
    target = tmp_path / LATEST
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.symlink_to(tmp_path / "nowhere")
    run = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    assert run.path.is_dir() and not run.path.is_symlink()
    kept = tmp_path / "run-20261121-120005-rotated"
    assert kept.read_text() == "mine" if kind == "file" else kept.is_symlink()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', '{"id":"x","key":"k","open":true}'])
def test_a_marker_that_cannot_be_read_counts_as_none(tmp_path: Path, text: str) -> None:
    first = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    (first.path / MARKER).write_text(text)
    again = open_run_dir(tmp_path, key="k", clock=lambda: datetime(2026, 12, 1))
    assert not again.resumed and again.rotated_to == tmp_path / "run-20261121-1200"


def test_a_crash_between_rename_and_create_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    (first.path / "result").write_text("1")
    close_run_dir(first.path)

    def crash(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("layerscope.store.rundir._create", crash)
        open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    assert visible(tmp_path) == ["run-20261121-120005"]
    (tmp_path / ".layerscope-new-dead").mkdir()  # of a process killed while it created
    run = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    assert visible(tmp_path) == ["run-20261121-120005", LATEST]
    assert run.rotated_to is None and not (tmp_path / ".layerscope-new-dead").exists()
    assert (tmp_path / "run-20261121-120005" / "result").read_text() == "1"


def test_the_folder_of_a_live_process_is_left_alone(tmp_path: Path) -> None:
    run = open_run_dir(tmp_path, key="k", clock=lambda: NOON)
    parent = psutil.Process(os.getppid())
    owner = Owner(Owner.current().host, parent.pid, parent.create_time())
    marker = json.loads((run.path / MARKER).read_text())
    (run.path / MARKER).write_text(json.dumps(marker | {"owner": asdict(owner)}))
    for key in ("k", "other"):
        with pytest.raises(OutputError, match=rf"process {parent.pid} is writing .*run-latest"):
            open_run_dir(tmp_path, key=key)
    assert visible(tmp_path) == [LATEST]
    gone = asdict(owner) | {"process_started": 1.0}  # the id was used again
    (run.path / MARKER).write_text(json.dumps(marker | {"owner": gone}))
    assert open_run_dir(tmp_path, key="k").resumed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="choose another --out"):
        open_run_dir(tmp_path / "out", key="k")


def test_an_out_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        open_run_dir(tmp_path / "out", key="k")


def test_a_plain_folder_gets_an_identity_once(tmp_path: Path) -> None:
    first = identify(tmp_path, key="k", clock=lambda: NOON)
    assert identify(tmp_path, key="other", clock=lambda: NOON) == first
    marker = read_marker(tmp_path)
    assert marker is not None and marker.open and marker.key == "k"
    close_run_dir(tmp_path)
    closed = read_marker(tmp_path)
    assert closed is not None and not closed.open and closed.id == first


def test_closing_a_folder_without_marker_does_nothing(tmp_path: Path) -> None:
    close_run_dir(tmp_path)
    assert visible(tmp_path) == []
