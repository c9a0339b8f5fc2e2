"""The benchmark for a GPU is ready: its tiny shape goes through every stage on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.bench_pathways_gpu import main

from layerscope.experiments.pathways import NAMES


def test_the_tiny_shape_runs_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--device", "cpu", "--folder", str(tmp_path), "--out", str(tmp_path)])
    assert "end to end" in capsys.readouterr().out
    found = json.loads((tmp_path / "pathways_gpu_tiny.json").read_text())
    stages = [row["job"] for row in found["rows"]][1:-1]
    assert stages == list(NAMES)
    assert all(row["peak_bytes"] > 0 for row in found["rows"][1:-1])
    assert any("40 edges from" in remark for remark in found["remarks"])  # 2 layers, 4 targets each
