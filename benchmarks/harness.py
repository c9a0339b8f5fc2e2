"""One harness for every benchmark: interleaved rounds, medians with min and max, peak memory.

A benchmark is a set of contenders that do the same job. They take turns, round after round, so
that whatever else the machine does hits all of them alike; the first contender is the baseline of
the ratios. Results are written as JSON, with machine and versions, and printed as a table.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "nnterp", "tuned-lens", "layerscope")
# Threads that the previous contender left spinning must not be charged to the next one.
SETTLE_S = 0.03
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float | int]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "rounds": len(self.seconds),
        }


@dataclass
class Report:
    """Rows of one benchmark and the claims that they are held against."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, job: str, timings: Mapping[str, Timing], **notes: Any) -> None:
        baseline = next(iter(timings.values())).median
        for contender, timing in timings.items():
            self.rows.append(
                {
                    "job": job,
                    "contender": contender,
                    **timing.to_dict(),
                    "ratio": timing.median / baseline,
                    **notes,
                }
            )

    def claim(self, text: str, measured: float, bound: float, *, at_most: bool = True) -> None:
        met = measured <= bound if at_most else measured >= bound
        self.claims.append(
            {
                "claim": text,
                "measured": round(measured, 4),
                "bound": bound,
                "at_most": at_most,
                "met": bool(met),
            }
        )

    def save(self, folder: Path = RESULTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content: dict[str, Any] = {"machine": machine(), "rows": self.rows, "claims": self.claims}
        if self.remarks:
            content["remarks"] = self.remarks
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def show(self) -> None:
        print(f"\n{self.name}: {machine()['cpu']}, {machine()['threads']} threads")
        columns = ("median ms", "min", "max")
        print(
            f"{'job':34s} {'contender':38s}" + "".join(f"{name:>11s}" for name in columns), "ratio"
        )
        for row in self.rows:
            print(
                f"{row['job']:34s} {row['contender']:38s}{row['median_s'] * 1e3:11.1f}"
                f"{row['min_s'] * 1e3:11.1f}{row['max_s'] * 1e3:11.1f} {row['ratio']:5.2f}"
            )
        for claim in self.claims:
            sign = "<=" if claim["at_most"] else ">="
            verdict = "met" if claim["met"] else "NOT MET"
            print(f"{verdict:8s} {claim['claim']}: {claim['measured']:.3f} {sign} {claim['bound']}")
        for remark in self.remarks:
            print(remark)


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 1
) -> dict[str, Timing]:
    """Run every contender `warmup` times, then `rounds` times in turn; the order rotates."""
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def paired_ratio(timings: Mapping[str, Timing], numerator: str, denominator: str) -> float:
    """Median over rounds of one contender's time over another's in the same round."""
    pairs = zip(timings[numerator].seconds, timings[denominator].seconds, strict=True)
    return statistics.median(top / bottom for top, bottom in pairs)


def set_threads(count: int = 2) -> None:
    """Use as many threads in torch as the published figures do."""
    import torch

    torch.set_num_threads(count)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that the figures belong to."""
    versions = {}
    for package in (
        "torch",
        "transformers",
        "transformer-lens",
        "nnterp",
        "tuned-lens",
        "layerscope",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    threads = os.cpu_count()
    if "torch" in sys.modules:
        import torch

        threads = torch.get_num_threads()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process so far, in bytes."""
    from layerscope.allocator import peak_memory_bytes

    found = peak_memory_bytes()
    assert found is not None, "this system does not tell"
    return found
