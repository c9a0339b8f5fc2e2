"""A battery of 600 facts through four lenses on the embedded model: time, memory, and kills.

    python -m benchmarks battery

Two readings of "600 facts": asked plainly on one thread, beside another's answer (600 prompts),
and with every control on all cores (some twenty prompts a fact). Then the command line is killed at
random moments and started again; its tables must be the same bytes. The fitted lenses are small
ones, fitted here: their quality does not matter to the time they take.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Report, Timing, peak_rss_bytes, set_threads
from benchmarks.models import MODELS
from layerscope.demo import model_path
from layerscope.experiments.battery import PARTS, Battery, BatteryConfig, execute, plan
from layerscope.lenses.fitting import DataConfig, fit_lens
from layerscope.models import LanguageModel, load

ITEMS = 600
LIMIT_S = 60.0
LIMIT_BYTES = 1e9
LENSES = ("raw", "norm", "prism", "tuned")
KILLS = 3
WORDS = "the girl went to a park and saw one big dog with her friend in France"


def facts(model: LanguageModel, count: int) -> Battery:
    """Return shipped facts that this model can be asked: English ones, then German capitals."""
    whole = Battery.builtin()
    order = ("en", "de")
    items = [
        item
        for item in whole.items
        if not item.invented
        and item.language in order
        and (item.language == "en" or item.relation == "capital")
    ]
    items.sort(key=lambda item: (order.index(item.language), item.key))
    small = replace(whole, items=tuple(items), absent=())
    asked = plan(model, small, BatteryConfig(parts=())).prepared.asked
    kept = {entry.question.item.key for entry in asked}
    chosen = [item for item in items if item.key in kept][:count]
    return replace(small, items=tuple(chosen))


def fitted(model: LanguageModel) -> dict[str, str | Path]:
    """Fit two small lenses once, and keep them."""
    found: dict[str, str | Path] = {}
    for kind in ("prism", "tuned"):
        folder = found[kind] = MODELS / "battery-lenses" / kind
        if (folder / "lens.json").exists():
            continue
        draw, words = random.Random(0), WORDS.split()
        text = MODELS / "battery-lenses" / "text.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(300)))
        data = DataConfig(tokens=4096, evaluation_tokens=1024, context=64, positions=16)
        fit_lens(kind, model, text, folder, data=data)
    return found


def kills(folder: Path, *, times: int, seed: int = 0) -> bool:
    """Kill the command line at random moments; say whether the tables end as the same bytes."""
    command = [sys.executable, "-m", "layerscope", "battery", str(model_path()), "--limit", "8"]
    # One thread: several would spin where the machine is shared.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {
        "env": alone,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }

    def words(name: str) -> list[str]:
        return [*command, "--out", str(folder / name), "--no-html", "--json"]

    start = time.perf_counter()
    subprocess.run(words("whole"), check=True, **quiet)
    whole = time.perf_counter() - start
    moments = random.Random(seed)
    for _ in range(times):
        process = subprocess.Popen(words("killed"), **quiet)
        try:
            process.communicate(timeout=moments.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    subprocess.run(words("killed"), check=True, **quiet)
    return digests(folder / "killed") == digests(folder / "whole")


def digests(out: Path) -> dict[str, str]:
    tables = sorted((out / "run-latest").glob("*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tables}


def main() -> Report:
    set_threads(1)
    report = Report("battery")
    model = load(model_path())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = fitted(model)
        jobs: tuple[tuple[str, int | None, tuple[str, ...]], ...] = (
            ("plain question, one thread", 1, ("permuted",)),
            ("every control, all cores", None, PARTS),
        )
        battery = facts(model, ITEMS)
        for job, threads, parts in jobs:
            set_threads(threads or os.cpu_count() or 1)
            config = BatteryConfig(lenses=LENSES, artifacts=artifacts, parts=parts)
            before = psutil.Process().memory_info().rss
            start = time.perf_counter()
            outcome = execute(plan(model, battery, config))
            took = time.perf_counter() - start
            grown = max(0, peak_rss_bytes() - before)
            counts = outcome.summary["counts"]
            what = f"{counts['items']} facts, {len(LENSES)} lenses, {job}"
            report.add(
                what,
                {"layerscope battery": Timing((took,))},
                prompts=counts["prompts"],
                peak_above_model_bytes=grown,
                seconds=outcome.provenance["timing"]["seconds"],
            )
            report.claim(f"seconds after load: {what}", took, LIMIT_S)
            report.claim(f"bytes above the loaded model: {what}", grown, LIMIT_BYTES)
        same = kills(folder, times=KILLS)
        report.claim(f"tables identical after {KILLS} kills", float(same), 1.0, at_most=False)
    return report
