"""Keeping freed memory: fewer page faults, the same numbers, and a truthful answer elsewhere."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from layerscope import allocator, keep_freed_memory
from layerscope.allocator import peak_memory_bytes

COUNT_FAULTS = """
import resource, sys
import numpy as np
from layerscope.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
if sys.argv[1] == "load":
    import layerscope
    from layerscope.demo import model_path
    layerscope.load(model_path(), verify=False)
def work():
    for _ in range(20):
        held = [np.ones(1 << 17) for _ in range(8)]  # 1 MiB each
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    assert faults("keep") < 0.2 * faults("as found")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_loading_a_model_keeps_freed_memory_from_then_on() -> None:
    assert faults("load") < 0.2 * faults("as found")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_a_choice_in_the_environment_stands(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_elsewhere_nothing_changes_and_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux inherits it")
def test_the_peak_is_that_of_this_process_not_of_its_parent() -> None:
    held = bytearray(400 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    show = "from layerscope.allocator import peak_memory_bytes as peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held) < (peak_memory_bytes() or 0)
