"""Peers live in their own virtual environments, because they cannot share ours."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Timing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / "benchmarks" / ".venvs"
PEERS = (
    "transformer-lens",
    "nnterp",
    "tuned-lens",
    "tuned-lens-trainer",
    "nnsight",
    "interp-engine",
    "pyvene",
    "steering-vectors",
    "circuit-tracer",
)
# By far the largest of what all need, and the same for all.
LENT = ("torch", "triton", "nvidia-")


def python_of(peer: str) -> Path | None:
    """Return the interpreter that runs a contender's peer; None when it is not installed."""
    if peer in ("layerscope", "huggingface"):
        return Path(sys.executable)
    python = ENVIRONMENTS / peer / "bin" / "python"
    return python if python.exists() else None


def install(peer: str) -> None:
    """Create the environment of one peer from its pinned requirements.

    This interpreter's torch lies on the new environment's path after its own packages, so that pip
    fetches it again only where a peer pins another version.
    """
    folder = ENVIRONMENTS / peer
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(
        subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    )
    (packages / "lent.pth").write_text(f"{_lent()}\n")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", str(HERE / f"{peer}.txt")], check=True)
    alone = HERE / f"{peer}.no-deps.txt"
    if alone.exists():
        subprocess.run([*pip, "--no-deps", "-r", str(alone)], check=True)


def _lent() -> Path:
    """Return a folder with links to this interpreter's torch alone, not to all that it has."""
    folder = ENVIRONMENTS / "lent"
    folder.mkdir(parents=True, exist_ok=True)
    for distribution in importlib.metadata.distributions():
        if not distribution.name.startswith(LENT):
            continue
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            link.unlink(missing_ok=True)
            link.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


class Process:
    """A program that answers every line on stdin with one line of JSON.

    Raises:
        FileNotFoundError: the peer's environment is not installed.
        RuntimeError: the program stopped instead of answering.
    """

    def __init__(self, name: str, arguments: list[str]) -> None:
        python = python_of(name.split(":")[0])
        if python is None:
            raise FileNotFoundError(name)
        self.name = name
        # A file, not a pipe: nobody reads warnings, and a full pipe would stop the program.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), *arguments],
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait(self) -> None:
        """Return when the program has loaded what it needs."""
        self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the program by closing its input, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(f"{self.name} stopped: {self._errors.read()[-800:]}")


@dataclass
class Worker:
    """A contender that waits in its own process until it is its turn."""

    contender: str
    process: Process
    seconds: list[float] = field(default_factory=list)
    peak_rss: int = 0

    @staticmethod
    def start(contender: str, folder: Path, *, tokens: int, threads: int) -> Worker:
        arguments = [str(HERE / "worker.py"), contender, str(folder)]
        arguments += ["--tokens", str(tokens), "--threads", str(threads)]
        worker = Worker(contender, Process(contender, arguments))
        try:
            worker.process.wait()
        except BaseException:
            worker.stop()
            raise
        return worker

    def turn(self, word: str = "run") -> dict[str, Any]:
        answer = self.process.ask(word)
        if word == "run":
            self.seconds.append(answer["seconds"])
        self.peak_rss = answer["peak_rss"]
        return answer

    def stop(self) -> None:
        self.process.stop()


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
