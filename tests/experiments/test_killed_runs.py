"""Killed anywhere and started again, every intervention experiment ends with the same bytes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.experiments.ablation import AblationConfig, ablate
from layerscope.experiments.back_patching import BackPatchConfig, back_patch
from layerscope.experiments.heads.run import HeadsConfig, heads
from layerscope.experiments.mediation.run import MediationConfig, mediation
from layerscope.experiments.patching import (
    Fact,
    PatchConfig,
    TraceConfig,
    execute_trace,
    patch,
    plan_trace,
)
from layerscope.experiments.patching.questions import Question
from layerscope.experiments.path_patching import PathConfig, path_patch
from layerscope.experiments.units import Outcome
from layerscope.files import canonical_json, sha256_text
from layerscope.interventions.heads import repeated_tokens
from layerscope.interventions.patching import PromptPair
from support.loaded import loaded

SENTENCE = "The capital of {} is called simply"
PAIRS = [
    PromptPair(
        key=clean,
        clean=SENTENCE.format(clean),
        corrupt=SENTENCE.format("Italy"),
        answers=(answer,),
        foils=(foil,),
    )
    for clean, answer, foil in (("France", "Paris", "Rome"), ("Germany", "Berlin", "Tokyo"))
]
QUESTIONS = [
    Question(key=pair.key, prompt=pair.clean, answers=pair.answers, foils=pair.foils)
    for pair in PAIRS
]
FACTS = [
    Fact(key=pair.key, prompt=pair.clean, subject=pair.key, answer=pair.answers[0])
    for pair in PAIRS
]

Run = Callable[..., Outcome]


def _trace(**units: Any) -> Outcome:
    config = TraceConfig(restore=("state", "mlp"), window=2, seeds=2, keep_wrong=True)
    return execute_trace(plan_trace(loaded("llama"), FACTS, config), **units)


RUNS: dict[str, Run] = {
    "patch": lambda **units: patch(
        loaded("llama"), PAIRS, PatchConfig(sites=("resid_pre", "heads"), keep_wrong=True), **units
    ),
    "trace": _trace,
    "path": lambda **units: path_patch(
        loaded("llama"), PAIRS, PathConfig(receivers=("logits", "2.0.k"), keep_wrong=True), **units
    ),
    "ablate": lambda **units: ablate(
        loaded("llama"),
        QUESTIONS,
        AblationConfig(how=("mean", "resample", "noise"), sets=(2,), keep_wrong=True),
        **units,
    ),
    "back-patch": lambda **units: back_patch(
        loaded("llama"), QUESTIONS, BackPatchConfig(max_new_tokens=2), **units
    ),
    "mediate": lambda **units: mediation(
        loaded("llama"), PAIRS, MediationConfig(keep_wrong=True, pairs_per_unit=1), **units
    ),
    "heads": lambda **units: heads(
        loaded("llama"),
        HeadsConfig(sequences=2, length=6, threshold=0.12, controls=2),
        **units,
    ),
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Disk:
    """Keeps units as files would, through Parquet and JSON; dies before one more than `life`."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[bytes, str]] = {}
        self.life: int | None = None
        self.found = 0

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any]] | None:
        if key not in self.kept:
            return None
        self.found += 1
        rows, payload = self.kept[key]
        return pl.read_parquet(io.BytesIO(rows)), json.loads(payload)

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        if self.life is not None and len(self.kept) >= self.life:
            raise Killed
        self.kept[key] = (parquet(frame), json.dumps(payload, allow_nan=False))


def parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def contents(outcome: Outcome) -> dict[str, Any]:
    tables = {name: parquet(table) for name, table in outcome.tables.items()}
    return {**tables, "summary": canonical_json(outcome.summary)}


def tokens_of(name: str) -> list[list[int]]:
    """Return the rows that a run read, tokenized here; its order of prompts is part of the hash."""
    model = loaded("llama")
    if name == "heads":
        return repeated_tokens(model, n_sequences=2, length=6).batch.ids.tolist()
    texts = [text for pair in PAIRS for text in (pair.clean, pair.corrupt)]
    if name in ("trace", "ablate", "back-patch"):
        texts = [pair.clean for pair in PAIRS]
    if name == "ablate":
        texts = texts * 2  # where means come from: the questions themselves
    return [list(model.tokenize([text]).row_ids(0)) for text in texts]


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_gives_the_same_bytes(name: str) -> None:
    do = RUNS[name]
    whole = Disk()
    outcome = do(units=whole)
    expected = contents(outcome)
    assert outcome.provenance["tokens_sha256"] == sha256_text(canonical_json(tokens_of(name)))
    assert whole.found == 0  # every unit has a key of its own
    disk = Disk()
    for life in sorted({1, len(whole.kept) - 1}):  # killed again and again, as runs are
        disk.life = life
        with pytest.raises(Killed):
            do(units=disk)
        assert len(disk.kept) == life
    disk.life = None
    seen: list[tuple[int, int]] = []
    found = do(units=disk, progress=lambda done, total: seen.append((done, total)))
    assert contents(found) == expected
    assert disk.kept == whole.kept  # the same units under the same keys, too
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


CHILD = """
import sys
from layerscope.cli.app import run
from layerscope.store.handle import RunHandle

put = RunHandle.put_unit

def put_and_wait(self, *unit):
    put(self, *unit)
    print("KEPT", flush=True)
    if sys.stdin.readline() == "":
        raise SystemExit(9)

RunHandle.put_unit = put_and_wait
sys.exit(run(sys.argv[1:]))
"""


def test_a_command_that_is_killed_for_good_goes_on_when_it_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.json"
    rows = [
        {"key": c, "clean": f"The capital of {c} is", "corrupt": "The capital of Japan is",
         "answer": a, "foil": "Tokyo"}
        for c, a in (("France", "Paris"), ("Italy", "Rome"))
    ]  # fmt: skip
    pairs.write_text(json.dumps(rows))
    command = ["path", str(model_path()), "--pairs", str(pairs), "--device", "cpu", "--json"]
    broken = [*command, "--out", str(tmp_path / "broken")]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *broken],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "KEPT\n"
        child.stdin.write("on\n")
        child.stdin.flush()
        assert child.stdout.readline() == "KEPT\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    (left,) = (tmp_path / "broken").glob("run-*")
    assert not (left / "summary.json").exists()

    from layerscope.store.handle import RunHandle

    kept: list[str] = []
    put = RunHandle.put_unit

    def counted(self: RunHandle, key: str, *unit: Any) -> None:
        kept.append(key)
        put(self, key, *unit)

    monkeypatch.setattr(RunHandle, "put_unit", counted)
    assert run(broken) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert len(kept) == 2  # two pairs and two controls, of which two units were there
    assert run([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert len(kept) == 2 + 4
    names = [path.rsplit("/", 1)[-1] for path in whole["files"]]
    for name in names:
        if name != "provenance.json":  # times and places
            ends = [Path(one["run_dir"]) / name for one in (resumed, whole)]
            assert ends[0].read_bytes() == ends[1].read_bytes(), name
