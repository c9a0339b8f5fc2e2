"""AlignmentResearch/tuned-lens's own trainer, in its own environment: one fit, then one JSON line.

    python tuned_lens_trainer.py MODEL TRAIN.jsonl --out FOLDER --optimizer sgd --steps 250 ...

Everything but the size of a step is the trainer's default.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


def peak() -> int:
    """Return VmHWM: what getrusage tells begins at the peak of the process that started this."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--out", required=True)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    import torch
    from tuned_lens.scripts import ingredients
    from tuned_lens.scripts.train_loop import Train

    torch.set_num_threads(given.threads)
    before, started = peak(), time.perf_counter()
    Train(
        model=ingredients.Model(name=given.model, precision="float32", slow_tokenizer=False),
        data=ingredients.Data(name=[given.text], max_length=given.context),
        opt=ingredients.Optimizer(
            optimizer=ingredients.OptimizerOption(given.optimizer), zero=False
        ),
        dist=ingredients.Distributed(fsdp=False, cpu_offload=False, per_gpu_batch_size=given.batch),
        output=Path(given.out),
        bias_only=False,
        num_steps=given.steps,
        tokens_per_step=given.batch * given.context,
    ).execute()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak(), "extra": peak() - before}))


if __name__ == "__main__":
    main()
