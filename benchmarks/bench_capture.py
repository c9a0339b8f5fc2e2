"""What capturing every residual, or every site, costs over the bare forward of the same module.

    python -m benchmarks capture

One process and one model, because the place of weights in memory alone moves a forward pass by
several percent; the peers' captures, each in a process of its own, are in ``lens``. Loading a model
on the CPU has the process keep freed memory (`layerscope.keep_freed_memory`); the bare forward runs
in the same process.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Report, interleave, paired_ratio, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.inputs import token_ids
from layerscope.models import load

BOUND = 1.03
EVERY_BOUND = 1.30


@torch.no_grad()
def main(*, rounds: int = 31, tokens: tuple[int, ...] = (64, 256)) -> Report:
    set_threads()
    model = load(llama_12x768())
    module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
    sites = model.sites()
    report = Report("capture")
    for count in tokens:
        ids = token_ids(model.d_vocab, count)
        rows = ids.tolist()
        timings = interleave(
            {
                "Hugging Face forward": lambda ids=ids: module(ids, use_cache=False).logits,
                "run, nothing captured": lambda rows=rows: model.run(rows),
                "run, every residual": lambda rows=rows: model.run(
                    rows, capture=["resid_pre.0", "resid_post.*"]
                ),
                "run, every site": lambda rows=rows: model.run(rows, capture=sites),
            },
            rounds=rounds,
            warmup=3,
        )
        report.add(f"capture, T={count}", timings)
        ratio = paired_ratio(timings, "run, every residual", "Hugging Face forward")
        report.claim(f"every residual / bare forward, T={count}", ratio, BOUND)
        ratio = paired_ratio(timings, "run, every site", "Hugging Face forward")
        report.claim(f"every site / bare forward, T={count}", ratio, EVERY_BOUND)
    return report
