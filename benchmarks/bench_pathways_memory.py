"""What the plan of a pathways run says of its memory, beside what the run takes.

    python -m benchmarks pathways_memory

Models of random weights, Llama and GPT-2, deep and wide, with small and large vocabularies and
dictionaries, few and many targets, short and long prompts. Each is planned and run on the CPU by a
process of its own, as a user's command is, and each stage of it says its peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_pathways_gpu import (
    Shape,
    prompt_words,
    random_model,
    write_data,
    write_dictionaries,
)
from benchmarks.harness import Report, Timing
from layerscope.models import LanguageModel, load

OFF_BY = 0.15
_BASE = Shape(6, 256, 4, 2, 688, 4096, 2048, 32, 8, 5, 32, 2, 200)


@dataclass(frozen=True)
class Case:
    """One shape, and which family it is of."""

    shape: Shape
    family: str = "llama"


CASES = {
    "small": Case(_BASE),
    "deep": Case(replace(_BASE, layers=24, width=384, mlp=1024, features=4096, tokens=96)),
    "wide": Case(
        replace(
            _BASE,
            layers=4,
            width=1024,
            heads=16,
            kv_heads=16,
            features=16_384,
            targets_per_layer=32,
        ),
        "gpt2",
    ),
    "vocabulary": Case(
        replace(_BASE, layers=12, width=768, heads=12, vocabulary=50_257, features=6144, tokens=48),
        "gpt2",
    ),
    "targets": Case(
        replace(_BASE, layers=8, width=512, heads=8, mlp=1376, targets_per_layer=64, tokens=64)
    ),
    "tokens": Case(replace(_BASE, layers=5, width=320, heads=5, kv_heads=5, tokens=480)),
    "dictionaries": Case(
        replace(_BASE, layers=6, width=512, heads=8, mlp=1376, features=32_768, vocabulary=32_000)
    ),
}


def main(names: Sequence[str] = ()) -> Report:
    report = Report("pathways_memory")
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.bench_pathways_memory", name, folder], check=True
            )
            _measure(report, name, Path(folder))
    worst = max(abs(row["planned_bytes"] / row["peak_bytes"] - 1) for row in report.rows)
    report.claim("planned / measured peak, off by at most", worst, OFF_BY)
    for row in report.rows:
        report.remarks.append(
            f"{row['job']:14s} planned {row['planned_bytes'] / 1e6:7.0f} MB, measured "
            f"{row['peak_bytes'] / 1e6:7.0f} MB in {row['stage']}: "
            f"{row['planned_bytes'] / row['peak_bytes'] - 1:+.1%}"
        )
    return report


def _measure(report: Report, name: str, folder: Path) -> None:
    """Plan and run one case, each in a process of its own."""
    planned = _layerscope(folder, CASES[name].shape, "--dry-run")
    begun = time.perf_counter()
    done = _layerscope(folder, CASES[name].shape)
    seconds = time.perf_counter() - begun
    peaks = {stage: found["peak_memory_bytes"] for stage, found in done["stages"].items()}
    stage = max(peaks, key=lambda each: peaks[each])
    report.add(
        name,
        {"layerscope": Timing((seconds,))},
        **vars(CASES[name].shape),
        family=CASES[name].family,
        planned_bytes=planned["peak_bytes"],
        peak_bytes=peaks[stage],
        stage=stage,
        peaks=peaks,
        held=planned["held_bytes"],
        phases=planned["phase_bytes"],
        dictionaries=planned["dictionary_bytes_held"],
    )


def _layerscope(folder: Path, shape: Shape, *more: str) -> dict[str, Any]:
    given = {
        "top_n_per_layer": shape.targets_per_layer,
        "top_k_pathways": shape.edges,
        "permutations": shape.permutations,
        "nulls": 2,
        "drivers": 2,
    }
    words = [sys.executable, "-m", "layerscope", "pathways", "run", "--json"]
    for option in ("data", "model", "dictionaries"):
        words += [f"--{option}", str(folder / option)]
    for field, value in given.items():
        words += ["--set", f"{field}={value}"]
    words += ["--device", "cpu", "--out", str(folder / "run"), *more]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode > 1:
        raise SystemExit(f"{' '.join(words)}\n{made.stdout[-2000:]}{made.stderr[-2000:]}")
    return json.loads(made.stdout)


def make(name: str, folder: Path) -> None:
    """Write model, dictionaries and data of a case."""
    case = CASES[name]
    shape, place = case.shape, folder / "model"
    model = random_model(shape, torch.device("cpu"), place)
    if case.family == "gpt2":
        model = _gpt2(shape, model, place)
    module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
    module.float().save_pretrained(place)
    words = prompt_words(shape, shape.tokens)
    chosen = write_dictionaries(model, shape, words, folder / "dictionaries")
    write_data(shape, chosen, words, folder / "data")
    _strew(folder / "data")


def _strew(data: Path) -> None:
    """Give the features effects of all sizes: the largest are anywhere, as in an experiment."""
    generator = torch.Generator().manual_seed(4)
    for path in data.glob("checkpoint_*.json"):
        content = json.loads(path.read_text())
        for record in content["results"]:
            record["cohen_d"] = float(torch.randn((), generator=generator))
        path.write_text(json.dumps(content))


def _gpt2(shape: Shape, like: LanguageModel, place: Path) -> LanguageModel:
    """Return a GPT-2 of the same sizes and tokenizer; its MLP is four times as wide as it is."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(place)
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(config)
    return load(module.eval().requires_grad_(False), tokenizer=like.tokenizer)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
