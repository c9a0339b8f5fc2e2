"""How near each lens comes to the model: held-out KL of all lenses, fitted with today's defaults.

    python -m benchmarks.bench_lenses [JOB...]

Fits `tuned` (with its bias-only twin), `prism` and `jacobian` (of JACOBIAN sequences) to the
embedded model and to two trained models beside the checkout, and writes KL(model || lens) in bits
at 25, 50 and 75% depth; for the embedded model also how the built-in capitals are read through the
lenses. About half an hour in all on two cores; rows of jobs that are not named stay in the result.
Seconds are not compared: `bench_fit` does that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Report, set_threads
from benchmarks.peers.environments import ROOT
from layerscope import analyze, load
from layerscope.demo import model_path
from layerscope.experiments.layers import LayersConfig
from layerscope.lenses.fitting import DataConfig, JacobianOptions, Kind, fit_lens
from layerscope.models import LanguageModel

SHARED = Path(os.environ.get("LAYERSCOPE_SHARED", ROOT.parent / "shared"))
STORIES = SHARED / "data/tinystories_merged"
CASED, LOWER = STORIES / "tinystories_cased.jsonl", STORIES / "tinystories_lowercase_extra.jsonl"
OWN = "embedded, text of its own kind"
JOBS: dict[str, tuple[Path, str, DataConfig]] = {
    "embedded": (model_path(), str(CASED), DataConfig()),
    "stories260K": (SHARED / "models/stories260K", str(CASED), DataConfig()),
    "babyllama-tok105": (SHARED / "models/babyllama-tok105", str(LOWER), DataConfig()),
    OWN: (model_path(), "layerscope-demo", DataConfig(context=128)),
}
KINDS: tuple[Kind, ...] = ("tuned", "prism", "jacobian")
COLUMNS = ("raw", "norm", "temperature", "bias", "prism", "tuned", "jacobian")
JACOBIAN = 8


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; all of them by default")
    chosen: list[str] = parser.parse_args(arguments).jobs or list(JOBS)
    set_threads()
    report = Report("lenses")
    for job in chosen:
        found = _rows(job)
        report.rows = [*_stored(without=job), *found]
        report.rows.sort(key=lambda row: list(JOBS).index(row["job"]))
        _claim(report)
        report.save()
    _show(report)
    return report


def _rows(job: str) -> list[dict[str, Any]]:
    """Fit every lens to one model; one row per depth."""
    folder, text, data = JOBS[job]
    model = load(folder, device="cpu", dtype="float32")
    bits: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    depths: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {kind: f"{place}/{kind}" for kind in KINDS}
        for kind in KINDS:
            options = JacobianOptions(sequences=JACOBIAN) if kind == "jacobian" else None
            result = fit_lens(kind, model, text, folders[kind], data=data, options=options)
            bits = {**result.kl_bits, **bits}  # all have the same raw, norm and temperature
            depths = result.details["held_out"]["depths"]
            facts["positions"] = result.details["held_out"]["positions"]
            print(job, kind, result.details["seconds"], *result.warnings, sep="; ", flush=True)
        if folder == model_path():
            facts["capitals"] = _on_capitals(model, folders)
    return [
        {
            "job": job,
            "blocks": model.n_layers,
            "depth": depth,
            "row": row,
            "kl_bits": {name: bits[name][row] for name in COLUMNS},
            **facts,
        }
        for depth, row in depths.items()
    ]


def _on_capitals(model: LanguageModel, folders: Mapping[str, str]) -> dict[str, Any]:
    """Read the built-in prompts through the lenses: medians over facts."""
    config = LayersConfig(lenses=("raw", "norm", *folders), artifacts=folders)
    summary = analyze(model, config=config).summary
    compared, owed = summary["lens_comparison"], summary["tuned_lens"]["attribution"]
    return {
        "kl_to_final_bits": compared["kl_to_final_bits"],
        "milestones": compared["milestones"],
        "tuned_gains": owed["gains"]["kl_to_final_bits"],
        "preferred_lens": summary["preferred_lens"]["lens"],
    }


def _stored(*, without: str) -> list[dict[str, Any]]:
    path = RESULTS / "lenses.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["job"] != without]


def _claim(report: Report) -> None:
    """Hold the tuned lens against what it must beat."""
    report.claims.clear()
    for job in dict.fromkeys(row["job"] for row in report.rows):
        found = [row["kl_bits"] for row in report.rows if row["job"] == job]
        worst = max(bits["tuned"] / min(bits["norm"], bits["bias"]) for bits in found)
        report.claim(f"{job}: KL of tuned over the better of norm and bias, worst depth", worst, 1)


def _show(report: Report) -> None:
    """Print the rows as they stand in docs/lenses.md."""
    for row in report.rows:
        bits = " | ".join(f"{row['kl_bits'][name]:.2f}" for name in COLUMNS)
        print(f"| {row['job']}, {row['blocks']} blocks | {row['depth']} ({row['row']}) | {bits} |")
    for claim in report.claims:
        print(claim)
    for job, found in {row["job"]: row.get("capitals") for row in report.rows}.items():
        print(job, "on the built-in capitals:", found)


if __name__ == "__main__":
    main()
