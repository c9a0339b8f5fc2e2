"""The readout against its own bare matrix products, and against one unembedding per layer.

    python -m benchmarks readout

Bare products are the same products with the same row tiles and the same precision, written to one
reused buffer; nothing else. Every round runs all variants once, so that each ratio is taken between
neighbours in time. Peak memory is measured in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Report, interleave, paired_ratio, set_threads
from layerscope.allocator import keep_freed_memory
from layerscope.products import choose, products
from layerscope.readout import Reference, Request, TokenSets, Unembedding, readout

LAYERS, WIDTH, VOCAB = 13, 768, 32_000
BARE_ROWS = 208
MEMORY_MIB = 512


class Case:
    """All layers x positions of a random model, with every statistic asked for."""

    def __init__(self, positions: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.positions = positions
        rows = LAYERS * positions
        self.hidden = torch.randn(rows, WIDTH, generator=generator)
        weight = torch.randn(VOCAB, WIDTH, generator=generator).mul_(0.04)
        self.head = Unembedding(weight)
        last = (LAYERS - 1) * positions
        self.reference = Reference(index=last + torch.arange(positions).repeat(LAYERS))
        self.tokens = torch.randint(VOCAB, (positions,), generator=generator).repeat(LAYERS)[
            :, None
        ]
        prompt = torch.randperm(VOCAB, generator=generator)[:16].tolist()
        self.sets = TokenSets.of([prompt], torch.zeros(rows, 1, dtype=torch.long))

    def bare(self, mode: str) -> None:
        """The products and nothing else."""
        with products(mode):  # pyright: ignore[reportArgumentType]
            for block in self.hidden.split(BARE_ROWS):
                _ = block @ self.head.weight.T

    def full(self, mode: str) -> object:
        """Every statistic: both KLs, JS, L1, cosines, ranks, masses, top 20, gap, top-50 sets."""
        return readout(
            self.hidden,
            self.head,
            request=Request(top_k=20, overlap_k=50, extremes=False),
            reference=self.reference,
            tokens=self.tokens,
            token_sets=self.sets,
            products=mode,  # pyright: ignore[reportArgumentType]
        )

    def light(self, mode: str) -> object:
        """What the table holds at every position."""
        request = Request(top_k=10, kl_from_reference=False, js=False, l1=False, cosine=False)
        return readout(
            self.hidden,
            self.head,
            request=request,
            reference=self.reference,
            tokens=self.tokens,
            products=mode,  # pyright: ignore[reportArgumentType]
        )

    def last_position(self) -> Tensor:
        """The rows of all layers at one position."""
        return self.hidden[:: self.positions]


def per_layer(rows: Tensor, weight: Tensor) -> None:
    """One unembedding and one softmax for each layer, as a loop over layers has it."""
    for row in rows:
        logits = row[None] @ weight.T
        torch.log_softmax(logits, dim=-1)


def main(*, rounds: int = 9, positions: tuple[int, ...] = (64, 256)) -> Report:
    set_threads()
    keep_freed_memory()  # as `load` has it: no product is to wait for fresh memory
    report = Report("readout")
    bounds = {"default": 1.15, "checked": 1.35}
    for count in positions:
        case = Case(count)
        for mode, bound in bounds.items():
            timings = interleave(
                {
                    f"bare products, {mode}": partial(case.bare, mode),
                    f"all statistics, {mode}": partial(case.full, mode),
                    f"table columns, {mode}": partial(case.light, mode),
                },
                rounds=rounds,
                warmup=2,
            )
            report.add(f"{LAYERS} layers x {count} positions", timings)
            ratio = paired_ratio(timings, f"all statistics, {mode}", f"bare products, {mode}")
            report.claim(f"all statistics / bare products, {mode}, T={count}", ratio, bound)
    case = Case(positions[0])
    one = case.last_position()
    index = Reference(index=torch.full((LAYERS,), LAYERS - 1))
    last = interleave(
        {
            "one unembedding per layer": lambda: per_layer(one, case.head.weight),
            "readout, default": lambda: readout(
                one, case.head, reference=index, products="default"
            ),
            "readout, checked": lambda: readout(one, case.head, reference=index),
        },
        rounds=2 * rounds,
        warmup=2,
    )
    report.add("all layers, last position", last)
    for mode in bounds:
        ratio = paired_ratio(last, "one unembedding per layer", f"readout, {mode}")
        report.claim(f"per-layer loop / readout, {mode}", ratio, 4.0, at_most=False)
    peak = peak_memory_mib()
    report.claim("extra peak memory, 32 x 2,048 rows x 128,256 tokens (MiB)", peak, MEMORY_MIB)
    report.rows[-1]["products"] = choose("checked").to_dict()
    return report


def peak_memory_mib() -> float:
    """Return the extra peak memory of a large readout, less its statistics.

    32 layers x 2,048 positions x 128,256 tokens at width 1,024 would take hours here; memory does
    not depend on the number of rows, so 1,024 of them are read. Peak resident set of a fresh
    process, over what it held before the readout.
    """
    script = (
        "import torch\n"
        "from layerscope.allocator import peak_memory_bytes\n"
        "from layerscope.products import choose\n"
        "from layerscope.readout import *\n"
        "torch.set_num_threads(2)\n"
        "choose('checked')\n"
        "weight = torch.randn(128256, 1024)\n"
        "hidden = torch.randn(1024, 1024)\n"
        "index = torch.arange(32).repeat_interleave(32) * 32 + 31\n"
        "readout(hidden[:4, :8], Unembedding(weight[:64, :8].contiguous()))\n"
        "before = peak_memory_bytes()\n"
        "readout(hidden, Unembedding(weight), reference=Reference(index=index))\n"
        "print((peak_memory_bytes() - before) / 2**20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return float(done.stdout)
