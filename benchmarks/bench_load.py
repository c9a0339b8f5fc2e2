"""What loading takes in memory at its highest, over the weights as they are when it is done.

    python -m benchmarks load

Each case is a process of its own, which first loads the embedded model, so that libraries and
allocators are there, and then measures two peaks while the large model loads (Linux only):

- resident: the kernel's high-water mark of all resident pages (VmHWM, reset before), with those of
  mapped files, though the kernel takes those back whenever somebody needs memory;
- anonymous: the most of RssAnon, sampled every millisecond: what nobody can take back.

Both are over what was there before, the tokenizer included, and held against the bytes of the
weights in their final dtype. Where the file's dtype is the one asked for, weights stay mapped until
used, so every weight is touched before the marks are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Timing
from benchmarks.models import MODELS, llama_12x768

BOUND = 1.05
CASES = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32"))
CONTENDERS = ("layerscope", "transformers")


def main(*, rounds: int = 2) -> Report:
    report = Report("load")
    for stored, wanted in CASES:
        folder = llama_12x768() if stored == "float32" else _half()
        job = f"{stored} file to {wanted}"
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        found: dict[str, dict[str, float]] = {}
        for _ in range(rounds):
            for name in CONTENDERS:
                result = measure(folder, wanted, name)
                seconds[name].append(result["seconds"])
                worst = found.setdefault(name, {"resident": 0.0, "anonymous": 0.0})
                for key in worst:
                    worst[key] = max(worst[key], result[key] / result["weights"])
        timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
        report.add(job, timings, peaks_over_weights=found)
        for key in ("resident", "anonymous"):
            report.claim(f"{key} peak / weights, {job}", found["layerscope"][key], BOUND)
    return report


def measure(folder: Path, dtype: str, contender: str = "layerscope") -> dict[str, float]:
    """Load in a process of its own and return bytes: weights, resident peak, anonymous peak."""
    code = (
        f"from benchmarks.bench_load import child; child({str(folder)!r}, {dtype!r}, {contender!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(folder: str, dtype: str, contender: str) -> None:
    """Measure one load in this process and print the figures as JSON."""
    from transformers import AutoTokenizer

    from layerscope.demo import model_path

    _load(str(model_path()), dtype, contender)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    anonymous: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            anonymous.append(_status("RssAnon"))
            time.sleep(0.001)

    before, before_anonymous = _status("VmRSS"), _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = _load(folder, dtype, contender, tokenizer)
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.sum()
    done.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "weights": weights,
                "resident": _status("VmHWM") - before,
                "anonymous": max(anonymous) - before_anonymous,
            }
        )
    )


def _load(folder: str, dtype: str, contender: str, tokenizer: Any = None) -> Any:
    if contender == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    from layerscope.models.backends.huggingface.loading import load_pretrained

    return load_pretrained(folder, device="cpu", dtype=dtype, tokenizer=tokenizer).model


def _status(key: str) -> int:
    """Return one figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _half() -> Path:
    """Return the same model, stored in bfloat16."""
    folder = MODELS / "llama-12x768-bf16"
    if not (folder / "config.json").exists():
        import torch

        from layerscope.models.backends.huggingface.loading import load_pretrained

        loaded = load_pretrained(llama_12x768(), device="cpu", dtype=torch.bfloat16)
        loaded.tokenizer.save_pretrained(folder)
        loaded.model.save_pretrained(folder)
    return folder
