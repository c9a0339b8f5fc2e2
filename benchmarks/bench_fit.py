"""Fitting a tuned lens, beside AlignmentResearch/tuned-lens's own trainer.

    python -m benchmarks install tuned-lens-trainer fit

Same model, same training text, of which layerscope reads a third (OUR_STEPS steps of OUR_BATCH
sequences, at OUR_POSITIONS positions of each; defaults otherwise). The held-out text is seen by
neither. Each fit is a process of its own with two threads; time and extra memory count from after
the imports, the model's own code among them, and include loading the model and the text. The
trainer runs with its defaults (250 steps; SGD, and Adam as well) but for the size of a step, which
the text bounds. Both lenses are measured by the same program: KL(model || lens) in bits at the same
held-out positions. Short fits are repeated in turn, and medians compared. Needs trained models and
text beside the checkout.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Timing, set_threads
from benchmarks.peers.environments import HERE, ROOT, python_of
from layerscope import load
from layerscope.demo import model_path
from layerscope.lenses import load_lens, read_tuned_lens
from layerscope.lenses.fitting import DataConfig, TextSource
from layerscope.lenses.fitting.corpus import read_corpus
from layerscope.lenses.fitting.evaluate import kl_bits
from layerscope.lenses.fitting.states import collect

SHARED = Path(os.environ.get("LAYERSCOPE_SHARED", ROOT.parent / "shared"))
TEXT = SHARED / "data/tinystories_merged/tinystories_cased.jsonl"
STEPS, BATCH, CONTEXT = 250, 8, 256
OUR_STEPS, OUR_BATCH, OUR_POSITIONS = 160, 4, 252
OPTIMIZERS = ("sgd", "adam")
OURS = "layerscope"
LEEWAY = 1.01
HALF = 0.5
ROUNDS = {"embedded": 1, "stories260K": 3}  # a fit of a few seconds hangs on what else runs


def main() -> Report:
    set_threads()
    report = Report("fit")
    python = python_of("tuned-lens-trainer")
    if python is None:
        print("skipped: run `python -m benchmarks install tuned-lens-trainer` first")
        return report
    models = {"embedded": model_path(), "stories260K": SHARED / "models/stories260K"}
    with tempfile.TemporaryDirectory() as place:
        train, held_out = _split(Path(place))
        for name, folder in models.items():
            commands = _commands(python, str(folder), str(train))
            found = _measure(folder, held_out, commands, ROUNDS[name], Path(place) / name)
            _report(report, name, found)
    return report


def _commands(python: Path, folder: str, train: str) -> dict[str, list[str]]:
    """Return what fits a lens, by contender; where it goes is to be added."""
    module = "benchmarks.peers.tuned_lens_ours"
    tokens = str(OUR_STEPS * OUR_BATCH * CONTEXT)
    ours = ["--tokens", tokens, "--batch", str(OUR_BATCH), "--positions", str(OUR_POSITIONS)]
    commands = {OURS: [sys.executable, "-m", module, folder, train, *ours]}
    script = [str(python), str(HERE / "tuned_lens_trainer.py"), folder, train]
    sizes = ["--steps", str(STEPS), "--batch", str(BATCH), "--context", str(CONTEXT)]
    for optimizer in OPTIMIZERS:
        label = f"tuned-lens trainer, {optimizer}"
        commands[label] = [*script, "--optimizer", optimizer, *sizes]
    return commands


def _measure(
    folder: Path, held_out: Path, commands: dict[str, list[str]], rounds: int, place: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run every contender in turn, round after round, and measure the lenses it leaves."""
    model = load(folder, device="cpu", dtype="float32")
    data = DataConfig(tokens=2048, evaluation_tokens=16_384, context=CONTEXT)
    states = collect(model, read_corpus(TextSource(str(held_out)), model, data).held_out, data)
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in commands}
    for turn in range(rounds):
        for label, command in commands.items():
            out = place / f"{turn}-{label.split()[-1]}"
            run = _fit([*command, "--out", str(out)])
            lens = load_lens(out, model) if label == OURS else read_tuned_lens(out, model)
            runs[label].append({**run, "kl": kl_bits(model, lens, states)})
    return runs


def _report(report: Report, name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    seconds: dict[str, float] = {}
    extra: dict[str, float] = {}
    bits: dict[str, list[float]] = {}
    for label, found in runs.items():
        timing = Timing(tuple(run["seconds"] for run in found))
        seconds[label] = timing.median
        extra[label] = statistics.median(run["extra"] for run in found)
        bits[label] = [
            statistics.median(row) for row in zip(*(r["kl"] for r in found), strict=True)
        ]
        report.add(
            f"{name}, tuned lens", {label: timing}, kl_bits=bits[label], extra_bytes=extra[label]
        )
        listed = ", ".join(f"{value:.3f}" for value in bits[label])
        report.remarks.append(
            f"{name}, {label}: KL in bits by row: {listed}; extra peak {extra[label] / 2**20:.0f} "
            "MiB"
        )
    theirs = [label for label in runs if label != OURS]
    # The last row is the model itself.
    best = [min(rows) for rows in zip(*(bits[label] for label in theirs), strict=True)]
    worst = max(mine / other for mine, other in zip(bits[OURS][:-1], best[:-1], strict=True))
    report.claim(f"{name}: held-out KL over the best of the trainer's, worst row", worst, LEEWAY)
    quickest = min(seconds[label] for label in theirs)
    report.claim(f"{name}: wall time over the trainer's", seconds[OURS] / quickest, HALF)
    least = min(extra[label] for label in theirs)
    report.claim(f"{name}: extra peak memory over the trainer's", extra[OURS] / least, HALF)


def _split(place: Path) -> tuple[Path, Path]:
    """Deal the documents to text to fit on and text that is held out."""
    lines = TEXT.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    cut = len(lines) // 8
    held_out, train = place / "held-out.jsonl", place / "train.jsonl"
    held_out.write_text("".join(lines[:cut]))
    train.write_text("".join(lines[cut:]))
    return train, held_out


def _fit(command: list[str]) -> dict[str, Any]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not answers:
        raise RuntimeError(f"{command[1]} stopped: {done.stderr[-800:]}")
    return json.loads(answers[-1])
