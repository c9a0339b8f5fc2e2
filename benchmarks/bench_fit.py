"""Fitting a tuned lens, beside AlignmentResearch/tuned-lens's own trainer.

    python -m benchmarks install tuned-lens-trainer fit

Same model, same training text, of which layerscope reads a third (OUR_STEPS steps of OUR_BATCH
sequences, at OUR_POSITIONS positions of each; defaults otherwise). The held-out text is seen by
neither. Each fit is a process of its own with two threads; time and extra memory count from after
the imports, the model's own code among them, and include loading the model and the text. The
trainer runs with its defaults (250 steps; SGD, and Adam as well) but for the size of a step, which
the text bounds. Both lenses are measured by the same program: KL(model || lens) in bits at the same
held-out positions. Needs trained models and text beside the checkout.
"""

from __future__ import annotations

import json
import os
import random
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


def main() -> Report:
    set_threads()
    report = Report("fit")
    models = {"embedded": model_path(), "stories260K": SHARED / "models/stories260K"}
    with tempfile.TemporaryDirectory() as place:
        train, held_out = _split(Path(place))
        for name, folder in models.items():
            _compare(report, name, folder, train, held_out, Path(place) / name)
    return report


def _compare(
    report: Report, name: str, folder: Path, train: Path, held_out: Path, place: Path
) -> None:
    model = load(folder, device="cpu", dtype="float32")
    data = DataConfig(tokens=2048, evaluation_tokens=16_384, context=CONTEXT)
    states = collect(model, read_corpus(TextSource(str(held_out)), model, data).held_out, data)
    python = python_of("tuned-lens-trainer")
    if python is None:
        print("skipped: run `python -m benchmarks install tuned-lens-trainer` first")
        return
    runs: dict[str, dict[str, Any]] = {}
    arguments = [
        str(folder),
        str(train),
        str(place / OURS),
        "--tokens",
        str(OUR_STEPS * OUR_BATCH * CONTEXT),
        "--batch",
        str(OUR_BATCH),
        "--positions",
        str(OUR_POSITIONS),
    ]
    runs[OURS] = _fit([sys.executable, "-m", "benchmarks.peers.tuned_lens_ours", *arguments])
    runs[OURS]["kl"] = kl_bits(model, load_lens(place / OURS, model), states)
    for optimizer in OPTIMIZERS:
        out = place / optimizer
        script = [
            str(python),
            str(HERE / "tuned_lens_trainer.py"),
            str(folder),
            str(train),
            str(out),
        ]
        sizes = ["--steps", str(STEPS), "--batch", str(BATCH), "--context", str(CONTEXT)]
        label = f"tuned-lens trainer, {optimizer}"
        runs[label] = _fit([*script, "--optimizer", optimizer, *sizes])
        runs[label]["kl"] = kl_bits(model, read_tuned_lens(out, model), states)
    for label, run in runs.items():
        timing = {label: Timing((run["seconds"],))}
        report.add(f"{name}, tuned lens", timing, kl_bits=run["kl"], extra_bytes=run["extra"])
        bits = ", ".join(f"{value:.3f}" for value in run["kl"])
        report.remarks.append(
            f"{name}, {label}: KL in bits by row: {bits}; extra peak {run['extra'] >> 20} MiB"
        )
    ours = runs.pop(OURS)
    best = [min(run["kl"][row] for run in runs.values()) for row in range(model.n_layers)]
    worst = max(mine / theirs for mine, theirs in zip(ours["kl"], best, strict=False))
    report.claim(f"{name}: held-out KL over the best of the trainer's, worst row", worst, LEEWAY)
    quickest = min(run["seconds"] for run in runs.values())
    report.claim(f"{name}: wall time over the trainer's", ours["seconds"] / quickest, HALF)
    least = min(run["extra"] for run in runs.values())
    report.claim(f"{name}: extra peak memory over the trainer's", ours["extra"] / least, HALF)


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
