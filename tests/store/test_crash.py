"""A run that is killed with SIGKILL at any step ends, when started again, with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from layerscope.files import sha256_file
from layerscope.store import Store
from layerscope.store.rundir import MARKER
from support import store_workload as workload


@pytest.fixture(scope="module")
def spawn() -> multiprocessing.context.BaseContext:
    # A fork server forks from a process that has imported everything and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.store_workload", "layerscope.store.store"])
    return context


def execute(spawn: multiprocessing.context.BaseContext, root: Path, step: int) -> int:
    root.mkdir(exist_ok=True)
    process = spawn.Process(target=workload.run_and_die, args=(root, step))  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    code = process.exitcode
    assert code is not None, "the worker hangs"
    return code


def table_of(root: Path) -> Path:
    tables = list((root / "out").glob("run*/table.parquet"))
    assert len(tables) == 1
    return tables[0]


def computed(root: Path) -> Counter[str]:
    return Counter((root / "computed.log").read_text().split())


def expect_finished(root: Path, reference: str, deaths: int) -> None:
    assert sha256_file(table_of(root)) == reference
    counts = computed(root)
    assert set(counts) == {str(index) for index in range(workload.N_UNITS)}
    # Each death repeats at most the one unit that was under way.
    assert sum(counts.values()) - workload.N_UNITS <= deaths
    with Store.open(root / "runs.db") as store:
        runs = store.runs(status="finished")
        assert len(runs) == len(store.runs()) == 1
        assert runs[0].n_units == 0
        assert runs[0].artifacts[0].sha256 == reference
    leftovers = [path for path in root.rglob("*") if "tmp" in path.name or "new" in path.name]
    assert leftovers == []


@pytest.fixture(scope="module")
def reference(
    spawn: multiprocessing.context.BaseContext, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, int]:
    """The table's hash of an undisturbed run, and how many steps it has."""
    root = tmp_path_factory.mktemp("reference")
    assert execute(spawn, root, 1_000_000) == 0
    low, high = 0, 1024  # smallest number of steps that lets a run finish
    while low < high:
        middle = (low + high) // 2
        root_of_probe = tmp_path_factory.mktemp("probe")
        if execute(spawn, root_of_probe, middle) == 0:
            high = middle
        else:
            low = middle + 1
    return sha256_file(table_of(root)), low


@pytest.mark.parametrize("seed", range(20))
def test_killed_once_at_a_random_step(
    spawn: multiprocessing.context.BaseContext,
    reference: tuple[str, int],
    tmp_path: Path,
    seed: int,
) -> None:
    digest, n_steps = reference
    # One step from each of 20 equal stretches of the run, so that every phase is met.
    step = int((seed + random.Random(seed).random()) * n_steps / 20)
    assert execute(spawn, tmp_path, step) == -signal.SIGKILL
    assert execute(spawn, tmp_path, 1_000_000) == 0
    expect_finished(tmp_path, digest, deaths=1)


def test_killed_again_and_again(
    spawn: multiprocessing.context.BaseContext, reference: tuple[str, int], tmp_path: Path
) -> None:
    digest, n_steps = reference
    deaths = 0
    generator = random.Random(1)
    while execute(spawn, tmp_path, generator.randrange(n_steps // 3, n_steps)) != 0:
        deaths += 1
        assert deaths < 40
    assert deaths > 0
    expect_finished(tmp_path, digest, deaths=deaths)


def test_nothing_is_half_written_at_any_moment(
    spawn: multiprocessing.context.BaseContext, reference: tuple[str, int], tmp_path: Path
) -> None:
    _digest, n_steps = reference
    for step in range(n_steps // 4, n_steps, 5):
        root = tmp_path / str(step)
        root.mkdir()
        execute(spawn, root, step)
        visible = [path for path in root.rglob("*.parquet") if not path.name.startswith(".")]
        assert all(path.read_bytes()[-4:] == b"PAR1" for path in visible), step
        markers = list(root.rglob(MARKER))
        assert all(json.loads(path.read_text()) for path in markers), step
        with Store.open(root / "runs.db") as store:
            # Killed after finish() the run is finished; before it, it is known to be interrupted.
            assert all(run.status in ("interrupted", "finished") for run in store.runs())
