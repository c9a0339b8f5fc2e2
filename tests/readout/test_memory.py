"""Peak memory of a readout, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading, time
import psutil, torch
from layerscope.readout import Reference, Request, Unembedding, readout

dtype, budget, layers, positions = getattr(torch, sys.argv[1]), int(sys.argv[2]), 17, 40
weight = torch.randn(64_000, 256).to(dtype)
hidden = torch.randn(layers * positions, 256)
index = (layers - 1) * positions + torch.arange(positions).repeat(layers)
# What libraries allocate once is not counted.
readout(hidden[:20], Unembedding(weight), kernels=sys.argv[3])
process, stop = psutil.Process(), threading.Event()
before = peak = process.memory_info().rss

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, process.memory_info().rss)

thread = threading.Thread(target=watch)
thread.start()
readout(
    hidden, Unembedding(weight), request=Request(overlap_k=50), reference=Reference(index=index),
    tokens=index[:, None], budget_bytes=budget, kernels=sys.argv[3],
)
stop.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_peak_memory_stays_near_the_budget(dtype: str, kernels: str) -> None:
    if kernels == "fused":
        pytest.importorskip("numba")
    budget = 48 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype, str(budget), kernels],
        check=True,
        capture_output=True,
        text=True,
    )
    # All logits would take 166 MiB, a float32 copy of the weights 62 MiB.
    assert int(done.stdout) < budget + 24 * 2**20
