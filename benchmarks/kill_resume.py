"""Kill a run of 200 prompts at random moments, start it again, and compare the bytes.

    python -m benchmarks.kill_resume [MODEL] [--kills 20] [--prompts 200] [--seed 0]

The tables of the interrupted and of the uninterrupted run must be identical.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from layerscope.demo import model_path

NAMES = ("Mira", "Tom", "Anna", "Jonas", "Lea", "Omar", "Nina", "Paul")
THINGS = ("key", "map", "lamp", "book", "ring", "coin", "rope", "bell")


def write_prompts(path: Path, count: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "prompt", "answer", "foil"])
        for number in range(count):
            name, thing = NAMES[number % 8], THINGS[(number // 8) % 8]
            other = NAMES[(number + 3) % 8]
            text = f"On day {number} {name} has the {thing}. The {thing} belongs to"
            writer.writerow([f"item-{number}", text, name, other])


def command(model: str, prompts: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "layerscope", "layers", model, "--prompts", str(prompts)]
    return [*words, "--out", str(out), "--no-html", "--json"]


def digest(out: Path) -> str:
    (table,) = (out / "run-latest").glob("*-layers.parquet")
    return hashlib.sha256(table.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prompts = base / "prompts.csv"
        write_prompts(prompts, options.prompts)
        start = time.perf_counter()
        subprocess.run(
            command(options.model, prompts, base / "whole"), check=True, stdout=subprocess.DEVNULL
        )
        whole = time.perf_counter() - start
        print(f"uninterrupted: {whole:.1f} s, table {digest(base / 'whole')[:16]}")
        attempt = killed = 0
        while killed < options.kills:
            attempt += 1
            process = subprocess.Popen(
                command(options.model, prompts, base / "killed"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            wait = moments.uniform(0.0, whole)
            try:
                _, errors = process.communicate(timeout=wait)
                print(
                    f"{attempt + 1:3d}: ended by itself with {process.returncode} {errors.strip()}"
                )
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
                print(f"{attempt:3d}: killed after {wait:.2f} s")
        subprocess.run(
            command(options.model, prompts, base / "killed"), check=True, stdout=subprocess.DEVNULL
        )
        same = digest(base / "killed") == digest(base / "whole")
        print(f"killed {killed} times; tables are {'identical' if same else 'DIFFERENT'}")
        return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
