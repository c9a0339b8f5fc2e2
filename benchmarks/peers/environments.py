"""Peers live in their own virtual environments, because they cannot share ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Timing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / "benchmarks" / ".venvs"
PEERS = ("transformer-lens", "nnterp", "tuned-lens")


def python_of(peer: str) -> Path | None:
    """Return the interpreter that runs a contender's peer; None when it is not installed."""
    if peer in ("layerscope", "huggingface"):
        return Path(sys.executable)
    python = ENVIRONMENTS / peer / "bin" / "python"
    return python if python.exists() else None


def install(peer: str) -> None:
    """Create the environment of one peer from its pinned requirements."""
    folder = ENVIRONMENTS / peer
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "-r", str(HERE / f"{peer}.txt")], check=True)


@dataclass
class Worker:
    """A contender that waits in its own process until it is its turn."""

    contender: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    peak_rss: int = 0

    @staticmethod
    def start(contender: str, folder: Path, *, tokens: int, threads: int) -> Worker:
        python = python_of(contender.split(":")[0])
        if python is None:
            raise FileNotFoundError(contender)
        command = [str(python), str(HERE / "worker.py"), contender, str(folder)]
        command += ["--tokens", str(tokens), "--threads", str(threads)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        worker = Worker(contender, process)
        worker._answer()
        return worker

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        assert self.process.stderr is not None
        raise RuntimeError(f"{self.contender} stopped: {self.process.stderr.read()[-800:]}")

    def turn(self, word: str = "run") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if word == "run":
            self.seconds.append(answer["seconds"])
        self.peak_rss = answer["peak_rss"]
        return answer

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def _environment() -> dict[str, str]:
    import os

    quiet = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **quiet}


def race(
    contenders: list[str], folder: Path, *, tokens: int, rounds: int, threads: int = 2
) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Let contenders take turns; return their timings, and per contender peak memory and values."""
    workers: list[Worker] = []
    try:
        for contender in contenders:
            try:
                workers.append(Worker.start(contender, folder, tokens=tokens, threads=threads))
            except FileNotFoundError:
                print(f"skipped {contender}: run `python -m benchmarks install` first")
        notes = {worker.contender: worker.turn("check") for worker in workers}
        for turn in range(rounds):
            shift = turn % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                worker.turn()
        for worker in workers:
            notes[worker.contender]["peak_rss"] = worker.peak_rss
        return {worker.contender: Timing(tuple(worker.seconds)) for worker in workers}, notes
    finally:
        for worker in workers:
            worker.stop()
