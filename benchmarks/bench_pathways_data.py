"""What the pathways pipeline does with data: 2 GB of response logs, a million tokens, trials.

    python -m benchmarks.bench_pathways_data [--gigabytes 2] [--tokens 1000000]

The audit stage on logs of 3.3 million records (hashes of the files included), in a process of its
own, so that its peak memory is its own: 2 minutes and 1 GB. The association of 1,550 features with
the tokens of 10,000 prompts, activations given: 60 seconds. And 256 sampled answers to 8 prompts of
the embedded model's slot machine, a feature patched in every row, as the causal-feature experiment
generates them: every row reading its own prompt, and equal prompts read once.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Report, Timing, interleave, set_threads
from layerscope.experiments.pathways.config import CONDITIONS

RECORDS, BYTES_EACH = 3_300_000, 600
FEATURES, PROMPTS, PROMPT_TOKENS, KINDS, DENSITY = 1_550, 10_000, 100, 20_000, 0.003

AUDIT = """
import json, sys, time
from pathlib import Path
from layerscope.experiments import provenance
from layerscope.experiments.pathways.audit import audit, Universe
from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.files import sha256_file

data = Path(sys.argv[1])
config = PathwaysConfig(data=str(data), model="toy", dictionaries="toy")
before = provenance.peak_memory_bytes()
start = time.perf_counter()
for path in sorted(data.glob("*.json")):
    sha256_file(path)
found = audit(config, Universe("toy", dict.fromkeys(range(32), 32_768), 4_096, "toy"))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak": provenance.peak_memory_bytes(),
    "before": before,
    "records": found.counts["responses"]["records"],
    "warnings": [each["code"] for each in found.findings.of("warning")],
    "errors": [each["code"] for each in found.findings.of("error")],
}))
"""


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=PROMPTS * PROMPT_TOKENS)
    parser.add_argument("--folder", type=Path, help="where logs are written; they stay there")
    parser.add_argument("--only", choices=("logs", "association", "trials"))
    parser.add_argument("--write-only", action="store_true", help="write the logs, measure nothing")
    options = parser.parse_args(arguments)
    set_threads()
    report = Report("pathways_data")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.only in (None, "logs"):
            if not list(folder.glob("responses_*.json")):
                write_logs(folder, round(RECORDS * options.gigabytes / 2))
            if not options.write_only:
                audit_logs(report, folder)
    if options.only in (None, "association") and not options.write_only:
        association(report, options.tokens)
    if options.only in (None, "trials") and not options.write_only:
        trials(report)
    report.show()
    return report


def write_logs(folder: Path, records: int) -> None:
    """Write checkpoints and response logs in the real schema, about 600 bytes a record."""
    generator = random.Random(0)
    words = ["bet", "stop", "win", "loss", "money", "risk", "again", "think", "spin", "balance"]
    trials = 30
    features = max(1, records // (trials * len(CONDITIONS)))
    per_file = 2_000
    for first in range(0, features, per_file):
        named = [(1 + n % 31, n) for n in range(first, min(first + per_file, features))]
        results = [
            {
                "feature": f"L{layer}-{n}",
                "layer": layer,
                "feature_id": n,
                "cohen_d": 0.5,
                "space": "toy",
                "causality": {"is_causal_safe": True, "is_causal_risky": False},
            }
            for layer, n in named
        ]
        stamp = f"{first // per_file:02d}"
        checkpoint = {"timestamp": f"2026-01-01T00:00:{stamp}", "results": results}
        name = f"L1_31_{stamp}_20260101_0000{stamp}.json"
        (folder / f"checkpoint_{name}").write_text(json.dumps(checkpoint))
        with (folder / f"responses_{name}").open("w") as file:
            file.write("[")
            for place, (layer, n) in enumerate(named):
                part: list[str] = []
                for condition in CONDITIONS:
                    for trial in range(trials):
                        text = " ".join(generator.choices(words, k=66))
                        part.append(
                            f'{{"feature": "L{layer}-{n}", "condition": "{condition}", "trial": '
                            f'{trial}, "response": "{text}", "parsed": {{"action": "stop", "bet": '
                            '0, "valid": true}, "timestamp": "2026-01-01T00:00:00", "layer": '
                            f'{layer}, "feature_id": {n}, "prompt_type": "{condition[:4]}", '
                            '"temperature": 0.7, "max_new_tokens": 100}'
                        )
                file.write(("," if place else "") + ",".join(part))
            file.write("]")


def audit_logs(report: Report, folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.json"))
    ended = subprocess.run(
        [sys.executable, "-c", AUDIT, str(folder)], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    report.add(
        f"audit of {found['records']:,} records",
        {"layerscope": Timing((found["seconds"],))},
        bytes=size,
        peak_bytes=found["peak"],
        peak_bytes_before=found["before"],
    )
    share = size / 2e9
    report.claim("seconds for 2 GB of response logs", found["seconds"] / share, 120.0)
    report.claim("peak GB of the process", found["peak"] / 1e9, 1.0)
    report.remarks.append(
        f"{size / 1e9:.2f} GB; errors {found['errors']}, warnings {found['warnings']}"
    )


def association(report: Report, n_tokens: int) -> None:
    """Zipf-like tokens; every tenth feature fires at one of them nine times as often."""
    import numpy as np

    from layerscope.features.association import Activations, AssociationOptions, associate

    generator = np.random.default_rng(0)
    shares = 1.0 / (np.arange(KINDS) + 10.0)
    tokens = generator.choice(KINDS, size=n_tokens, p=shares / shares.sum())
    clusters = np.arange(n_tokens) // PROMPT_TOKENS
    features: list[Any] = []
    places: list[Any] = []
    for feature in range(FEATURES):
        count = generator.poisson(n_tokens * DENSITY * generator.gamma(1.0))
        place = np.unique(generator.integers(n_tokens, size=count))
        if feature % 10 == 0:
            own = np.flatnonzero(tokens == feature % 300)
            chance = min(1.0, 9 * len(place) / n_tokens)
            place = np.union1d(place, own[generator.random(len(own)) < chance])
        features.append(np.full(len(place), feature))
        places.append(place)
    place = np.concatenate(places)
    value = generator.gamma(2.0, size=len(place)) + 0.01
    found = Activations(tokens, clusters, np.concatenate(features), place, value, FEATURES)
    start = time.perf_counter()
    table = associate(found, AssociationOptions())
    seconds = time.perf_counter() - start
    report.add(
        f"association, {n_tokens:,} tokens",
        {"layerscope": Timing((seconds,))},
        entries=len(place),
        rows=table.height,
    )
    report.claim("seconds for 1,550 features over a million tokens", seconds, 60.0)
    significant = table.filter(table["q"] < 0.05).height
    report.remarks.append(
        f"{len(place):,} active entries, {table.height:,} pairs, up to "
        f"{table['permutations'].max()} shuffles of the promising ones; {significant} with "
        "q < 0.05"
    )


def trials(report: Report, *, rows: int = 256, rounds: int = 5) -> None:
    """Shared prompts against every row's own, with the same tokens drawn."""
    from layerscope.demo import dictionaries_path, model_path
    from layerscope.experiments.causal_features import demo_task
    from layerscope.features import open_set
    from layerscope.features.row_edits import RowPatch, patch_rows
    from layerscope.models import TokenBatch, load

    model = load(model_path(), device="cpu", dtype="float32")
    dictionary = open_set(dictionaries_path())[7].load()
    games = demo_task(contrast=40, patched=8).patched["safe"]
    batch = model.tokenize([game.prompt for game in games])
    ids = [batch.row_ids(row % len(batch)) for row in range(rows)]
    patch = patch_rows(
        dictionary,
        [RowPatch(row, 3 + row % 5, float(row % 3), 3 + row % 5) for row in range(rows)],
        scope="last_k:1",
    )

    def answers(*, share: bool) -> tuple[tuple[int, ...], ...]:
        made = model.generate(
            TokenBatch.from_ids(ids, padding_side="left"),
            max_new_tokens=12,
            temperature=1.0,
            seed=list(range(rows)),
            edits=[patch],
            share_prompts=share,
        )
        return made.ids

    assert answers(share=True) == answers(share=False)
    timings = interleave(
        {
            "every row reads its prompt": lambda: answers(share=False),
            "equal prompts read once": lambda: answers(share=True),
        },
        rounds=rounds,
    )
    report.add(f"{rows} answers to {len(batch)} prompts", timings)
    gain = timings["every row reads its prompt"].median / timings["equal prompts read once"].median
    report.claim("answers, own prompts / shared prompts", gain, 1.0, at_most=False)
    lengths = [len(each) for each in ids]
    report.remarks.append(f"prompts of {min(lengths)} to {max(lengths)} tokens, same answers drawn")


if __name__ == "__main__":
    made = main()
    if made.rows:
        print(f"written to {made.save(RESULTS)}")
