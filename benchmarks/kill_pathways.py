"""Kill a pathways run at random moments, start it again each time, and compare the bytes.

    python -m benchmarks.kill_pathways [--kills 20] [--seed 0]

A moment is before or after one of the files that a run puts in place: between two of them nothing
changes on the disk. The process kills itself there with SIGKILL, so that no handler and no buffer
is of any use to it. All results must be those of the run that nobody killed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.bench_pathways_gpu import TINY, prompt_words, random_model, write_data
from benchmarks.bench_pathways_gpu import write_dictionaries as write_all

# What a run notes of time and memory, which no two runs share.
TIMED = ("run.json", "results/prototype/", "manifest/")

KILLED = """
import os, signal, sys

moment, after, wanted = int(sys.argv[1]), sys.argv[2] == "after", sys.argv[3]
put, seen = os.replace, 0

def replace(source, target, **options):
    global seen
    seen += wanted in str(target)
    mine = wanted in str(target) and seen == moment
    if mine and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    put(source, target, **options)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
from layerscope.cli.app import run
code = run(sys.argv[4:])
print(seen)
sys.exit(code)
"""


def run_killed(
    arguments: list[str], *, moment: int, after: bool = False, at: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run layerscope until it puts its file number `moment` (from 1) with `at` in its path."""
    words = [sys.executable, "-c", KILLED, str(moment), "after" if after else "before", at]
    return subprocess.run([*words, *arguments], capture_output=True, text=True, check=False)


def digests(out: Path) -> dict[str, str]:
    names = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(names.items())
        if not name.startswith(TIMED)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        model = random_model(TINY, torch.device("cpu"), base / "model")
        model.backend.model.save_pretrained(base / "model")  # pyright: ignore
        words = prompt_words(TINY, TINY.tokens)
        chosen = write_all(model, TINY, words, base / "dictionaries")
        write_data(TINY, chosen, words, base / "data")

        def command(out: str) -> list[str]:
            named = {"data": "data", "model": "model", "dictionaries": "dictionaries", "out": out}
            given = [word for name, part in named.items() for word in (f"--{name}", base / part)]
            settings = {"top_k_pathways": 5, "permutations": 100, "batch_size": 3, "drivers": 1}
            fields = [
                word for item in settings.items() for word in ("--set", "{}={}".format(*item))
            ]
            return ["pathways", "run", *map(str, given), *fields]

        whole = run_killed(command("whole"), moment=0)
        files = int(whole.stdout.split()[-1])
        print(f"uninterrupted: exit code {whole.returncode}, {files} files put in place")
        for kill in range(1, options.kills + 1):
            moment, after = moments.randint(1, files), moments.random() < 0.5
            ended = run_killed(command("killed"), moment=moment, after=after)
            if ended.returncode == -signal.SIGKILL:
                print(f"{kill:3d}: killed {'after' if after else 'before'} file {moment}")
                continue
            print(f"{kill:3d}: ended by itself with {ended.returncode}; beginning anew")
            if digests(base / "killed") != digests(base / "whole"):
                print("tables DIFFER")
                return 1
            (base / "killed").rename(base / f"done-{kill}")
        run_killed(command("killed"), moment=0)
        same = digests(base / "killed") == digests(base / "whole")
        print(f"results are {'identical' if same else 'DIFFERENT'}")
        return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
