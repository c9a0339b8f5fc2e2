"""Patching sweeps beside one forward per cell, positions batched per layer, and TransformerLens.

    python -m benchmarks install transformer-lens patching
    python -m benchmarks.bench_patching JOB...     only some jobs; the others' rows are kept

Every contender runs in a process of its own, and they take turns, round after round. Hooks on the
plain Hugging Face model and TransformerLens have torch's and the allocator's defaults. Where each
cell (or layer) costs them the same and all would take minutes, a sample of them is timed and
multiplied: rows say so. All numbers are compared with those of single forwards. The two prompts
differ in every token: no cell is idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    RESULTS,
    SETTLE_S,
    Report,
    Timing,
    interleave,
    paired_ratio,
    peak_rss_bytes,
    set_threads,
)
from benchmarks.models import gpt2_12x768, llama_12x768
from benchmarks.peers.environments import Process

MODELS: dict[str, Callable[[], Path]] = {"llama": llama_12x768, "gpt2": gpt2_12x768}
ANSWER, FOIL = 7, 11
ONE, BATCHED = "one forward per cell", "positions batched per layer"
PEER, OURS, CHECKED = "TransformerLens", "layerscope", "layerscope, checked products"
ROME = "one forward per cell, ten noisy rows together"


def _load(name: str) -> Any:
    import layerscope

    return layerscope.load(MODELS[name](), device="cpu", dtype="float32", verify=False)


def _prompts(tokens: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randperm(30_000, generator=generator)[: 2 * tokens].view(2, tokens) + 20


@dataclass(frozen=True)
class Turn:
    """What one contender gave in one round; seconds stand for all cells."""

    seconds: float
    values: list[float]


@dataclass
class Race:
    """Contenders of one job: `often` take part in every round, `seldom` in the first few."""

    often: dict[str, Callable[[], Turn]]
    seldom: dict[str, Callable[[], Turn]] = field(default_factory=dict[str, Callable[[], Turn]])

    def run(self, rounds: int, few: int) -> tuple[dict[str, Timing], dict[str, list[float]]]:
        """Return timings and the values of the last turn."""
        seconds: dict[str, list[float]] = {}
        values: dict[str, list[float]] = {}
        for turn in range(rounds):
            labels = [*self.often, *(self.seldom if turn < few else ())]
            shift = turn % len(labels)
            for label in labels[shift:] + labels[:shift]:
                time.sleep(SETTLE_S)
                done = (self.often | self.seldom)[label]()
                seconds.setdefault(label, []).append(done.seconds)
                values[label] = done.values
        return {label: Timing(tuple(own)) for label, own in seconds.items()}, values


def _ask(process: Process, scale: float, **request: Any) -> Turn:
    answer = process.ask(json.dumps({"answer": ANSWER, "foil": FOIL, **request}))
    return Turn(answer["seconds"] * scale, answer["values"])


def _timed(work: Callable[[], list[float]]) -> Turn:
    start = time.perf_counter()
    values = work()
    return Turn(time.perf_counter() - start, values)


@dataclass
class Bench:
    """The processes of one model, and the report."""

    report: Report
    name: str

    def __post_init__(self) -> None:
        folder = str(MODELS[self.name]())
        self.model = _load(self.name)
        self.hooks = Process("huggingface", ["-m", "benchmarks.peers.patching_hooks", folder])
        self.peer: Process | None = None
        try:
            arguments = ["-m", "benchmarks.peers.patching_worker", folder]
            self.peer = Process("transformer-lens", arguments)
        except FileNotFoundError:
            self.report.remarks.append("transformer-lens is not installed")
        for process in (self.hooks, self.peer):
            if process is not None:
                process.wait()

    def stop(self) -> None:
        for process in (self.hooks, self.peer):
            if process is not None:
                process.stop()

    def residuals(self, tokens: int) -> None:
        """Layer x position at resid_pre, clean into corrupt, logit difference."""
        clean, corrupt = _prompts(tokens).tolist()
        prompts = {"clean": clean, "corrupt": corrupt}
        n_layers, long = self.model.n_layers, tokens > 16
        cells = [(layer, at) for layer in range(n_layers) for at in range(tokens)]
        every, peer_every = (32, 32) if long else (8, 4)
        layers = [0, n_layers - 1] if long else list(range(n_layers))
        ask = partial(_ask, self.hooks)
        often: dict[str, Callable[[], Turn]] = {
            BATCHED: partial(ask, n_layers / len(layers), do="batched", layers=layers, **prompts),
            OURS: lambda: _timed(lambda: _sweep(self.model, clean, corrupt, "default")),
            CHECKED: lambda: _timed(lambda: _sweep(self.model, clean, corrupt, "checked")),
        }
        sample = cells[::every]
        seldom: dict[str, Callable[[], Turn]] = {
            ONE: partial(ask, len(cells) / len(sample), do="cells", cells=sample, **prompts)
        }
        if self.peer is not None:
            seldom[PEER] = partial(_ask, self.peer, 1.0, every=peer_every, **prompts)
            _ask(self.peer, 1.0, every=len(cells) // 4, **prompts)
        # Nobody is timed cold: everyone has done a part of the same job before.
        ask(1.0, do="cells", cells=sample[:4], **prompts)
        for products in ("default", "checked"):
            _sweep(self.model, clean, corrupt, products, every=4)
        timings, values = Race(often, seldom).run(rounds=2 if long else 5, few=2 if long else 3)
        exact = dict(zip(sample, values[ONE], strict=True))
        places = {
            OURS: cells,
            CHECKED: cells,
            ONE: sample,
            PEER: cells[::peer_every],
            BATCHED: [cell for cell in cells if cell[0] in layers],
        }
        shares = {ONE: every, PEER: peer_every, BATCHED: n_layers // len(layers)}
        job = f"{len(cells)} cells, {self.name}, T={tokens}"
        errors = {
            label: _error(dict(zip(places[label], own, strict=True)), exact)
            for label, own in values.items()
        }
        self._rows(job, timings, errors, shares)
        self.report.claim(f"largest difference to single forwards, {job}", errors[OURS], 1e-4)
        self._faster("positions batched per layer", job, timings, BATCHED, 3.0)
        if PEER in timings:
            self._faster("TransformerLens", job, timings, PEER, 10.0)
        gain = paired_ratio(timings, OURS, CHECKED)
        self.report.claim(f"checked over default products, {job}", gain, 1.5, at_most=False)

    def heads(self, tokens: int) -> None:
        """Every head's z at the last position, one at a time."""
        model = self.model
        clean, corrupt = _prompts(tokens).tolist()
        nodes = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
        every = 6 if tokens <= 16 else 12
        request = {"clean": clean, "corrupt": corrupt, "n_heads": model.n_heads}
        request["cells"] = nodes[::every]
        race = Race(
            {
                ONE: partial(_ask, self.hooks, every, do="heads", **request),
                OURS: lambda: _timed(lambda: _heads(model, clean, corrupt, nodes)),
            }
        )
        race.run(rounds=1, few=1)
        timings, values = race.run(rounds=3, few=3)
        found, exact = (
            dict(zip(cells, values[label], strict=True))
            for cells, label in ((nodes, OURS), (nodes[::every], ONE))
        )
        job = f"{len(nodes)} heads at the last position, {self.name}, T={tokens}"
        error = _error(found, exact)
        self._rows(job, timings, {ONE: 0.0, OURS: error}, {ONE: every})
        self.report.claim(f"largest difference to single forwards, {job}", error, 1e-4)
        self._faster("one forward per head", job, timings, ONE, 20.0)

    def rome(self, tokens: int = 16, seeds: int = 10) -> None:
        """All three grids of causal tracing, ten noisy rows; only the prompt's end is idle."""
        from layerscope.interventions.patching.tracing import Subject, trace, trace_cells

        subject = Subject(tuple(_prompts(tokens)[0].tolist()), (2, 3, 4), ANSWER)
        grid = [
            cell
            for restore in ("state", "mlp", "attn")
            for cell in trace_cells(self.model, tokens, restore)
        ]
        every = 31  # no multiple of the layers: a sample of all kinds, layers and positions
        sample = grid[::every]
        scale = len(grid) / len(sample)
        request = {"clean": list(subject.ids), "subject": list(subject.positions)}
        request |= {"noise": 0.1, "seeds": seeds}

        def rows(count: int) -> list[Any]:
            return [
                (cell.restore, cell.layers, cell.position, begin)
                for cell in sample
                for begin in range(0, seeds, count)
            ]

        def ours() -> list[float]:
            return (
                trace(self.model, subject, grid, noise=0.1, seeds=seeds).restored.flatten().tolist()
            )

        ask = partial(_ask, self.hooks, scale, do="trace", **request)
        race = Race(
            {
                ROME: partial(ask, cells=rows(seeds), rows=seeds),
                OURS: lambda: _timed(ours),
            },
            {ONE: partial(ask, cells=rows(1), rows=1)},
        )
        timings, values = race.run(rounds=2, few=2)
        exact = _pairs(sample, values[ONE], seeds)
        largest = max(exact.values())  # probabilities of a random model are small
        errors = {
            OURS: _error(_pairs(grid, values[OURS], seeds), exact) / largest,
            ROME: _error(_pairs(sample, values[ROME], seeds), exact) / largest,
            ONE: 0.0,
        }
        job = f"{len(grid)} cells x {seeds} noises of causal tracing, {self.name}, T={tokens}"
        self._rows(job, timings, errors, {ONE: every, ROME: every})
        self.report.claim(
            f"largest relative difference to single forwards, {job}", errors[OURS], 1e-5
        )
        self._faster("one forward per cell and noise", job, timings, ONE, 10.0)

    def _rows(
        self,
        job: str,
        timings: Mapping[str, Timing],
        errors: Mapping[str, float],
        shares: Mapping[str, int],
    ) -> None:
        for label, timing in timings.items():
            share = shares.get(label, 1)
            self.report.add(
                job,
                {label: timing},
                ratio=timing.median / timings[ONE].median,
                error=errors[label],
                timed=f"one in {share}, multiplied" if share > 1 else "all",
            )

    def _faster(
        self, than: str, job: str, timings: Mapping[str, Timing], label: str, bound: float
    ) -> None:
        """Claim a ratio: the median over the rounds in which both took part."""
        count = min(len(timings[label].seconds), len(timings[OURS].seconds))
        both = {key: Timing(timings[key].seconds[:count]) for key in (label, OURS)}
        ratio = paired_ratio(both, label, OURS)
        self.report.claim(f"faster than {than}, {job}", ratio, bound, at_most=False)


def _sweep(
    model: Any, clean: list[int], corrupt: list[int], products: str, every: int = 1
) -> list[float]:
    from layerscope.interventions.patching import (
        Place,
        PromptPair,
        Targets,
        TokenPair,
        nodes_of,
        sweep,
    )

    pair = TokenPair(
        PromptPair(key="random", clean="", corrupt=""),
        tuple(clean),
        tuple(corrupt),
        Targets((ANSWER,), (FOIL,)),
        ("",) * len(clean),
        tuple(Place(str(at), at, at) for at in range(len(clean))),
        0,
    )
    nodes = nodes_of(model, pair, "resid_pre")[::every]
    return sweep(model, pair, nodes, ["logit_diff"], products=products).cells[:, 0].tolist()


def _heads(
    model: Any, clean: list[int], corrupt: list[int], nodes: list[tuple[int, int]]
) -> list[float]:
    from layerscope.interventions.patching import (
        Cell,
        Patch,
        Reader,
        Targets,
        batch_of,
        metric_of,
        record,
        run_cells,
    )
    from layerscope.models import Site

    runs = record(model, batch_of([clean, corrupt]), capture="attn.*.z")
    reader = Reader(model, (metric_of("logit_diff"),), (Targets((ANSWER,), (FOIL,)),) * 2)
    last = len(clean) - 1
    sites = [Site("attn.z", layer) for layer in range(model.n_layers)]
    cells = [
        Cell((Patch(sites[at], (last,), runs.value(sites[at])[0, last:, head], head),), 1)
        for at, head in nodes
    ]
    return run_cells(runs, cells, reader)[:, 0].tolist()


def _pairs(cells: list[Any], values: list[float], seeds: int) -> dict[Any, float]:
    keys = [(cell, seed) for cell in cells for seed in range(seeds)]
    return dict(zip(keys, values, strict=True))


def _error(values: Mapping[Any, float], exact: Mapping[Any, float]) -> float:
    """Return the largest difference where both have a value."""
    return max(abs(values[key] - exact[key]) for key in exact if key in values)


def _product(report: Report) -> None:
    """One matrix product alone: what checked products can gain at most."""
    import torch

    from layerscope.products import choose, products

    left, right = torch.randn(1024, 768), torch.randn(3072, 768)

    def multiply(requested: Any) -> None:
        with products(requested):
            for _ in range(10):
                torch.nn.functional.linear(left, right)

    choice = choose("checked")
    found = {
        "default": partial(multiply, "default"),
        "checked": partial(multiply, choice),
    }
    timings = interleave(found, rounds=15)
    report.add("10 products, 1024 x 768 x 3072", timings, why=choice.reason)


def _memory(report: Report) -> None:
    """Peak memory of the sweep beside that of one batched forward that keeps its cache."""
    peaks: dict[str, int] = {}
    for what in ("forward", "sweep"):
        command = [sys.executable, "-m", "benchmarks.bench_patching", "--peak", what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[what] = int(done.stdout.split()[-1])
    ratio = peaks["sweep"] / peaks["forward"]
    report.rows.append(
        {
            "job": "peak memory, 768 cells, llama, T=64",
            "contender": OURS,
            **Timing((0.0,)).to_dict(),
            "ratio": ratio,
            "forward_bytes": peaks["forward"],
            "sweep_bytes": peaks["sweep"],
        }
    )
    report.claim("peak memory over one batched forward and its cache", ratio, 1.5)


def _peak(what: str) -> None:
    """Print by how many bytes a job raises the peak over that of a plain forward."""
    import torch

    set_threads()
    model = _load("llama")
    clean, corrupt = _prompts(64)
    with torch.no_grad():
        model.backend.model(input_ids=corrupt[None], use_cache=False)
    before = peak_rss_bytes()
    if what == "forward":  # what positions batched per layer hold at once
        ids = corrupt.expand(64, -1)
        with torch.no_grad():
            model.backend.model(input_ids=ids, use_cache=True, logits_to_keep=1)
    else:
        _sweep(model, clean.tolist(), corrupt.tolist(), "default")
    print(peak_rss_bytes() - before)  # the last word of this process


# By model, what runs on it; the first part of a job's name is the model, the rest its work.
WORK: dict[str, dict[str, Callable[[Bench], None]]] = {
    name: {
        f"{name}-16": partial(Bench.residuals, tokens=16),
        f"{name}-64": partial(Bench.residuals, tokens=64),
        f"{name}-heads-16": partial(Bench.heads, tokens=16),
        f"{name}-heads-64": partial(Bench.heads, tokens=64),
    }
    for name in MODELS
}
WORK["llama"]["llama-rome"] = Bench.rome
ALONE: dict[str, Callable[[Report], None]] = {"product": _product, "memory": _memory}
JOBS = (*(job for jobs in WORK.values() for job in jobs), *ALONE)


def main(jobs: tuple[str, ...] = JOBS) -> Report:
    set_threads()
    report = Report("patching")
    path = RESULTS / "patching.json"
    if path.exists() and set(jobs) != set(JOBS):
        kept = json.loads(path.read_text())
        report.rows = [row for row in kept["rows"] if row["part"] not in jobs]
        report.claims = [claim for claim in kept["claims"] if claim["part"] not in jobs]
    for name, work in WORK.items():
        chosen = [job for job in work if job in jobs]
        if not chosen:
            continue
        bench = Bench(report, name)
        try:
            for job in chosen:
                _part(report, job, partial(work[job], bench))
        finally:
            bench.stop()
    for job, do in ALONE.items():
        if job in jobs:
            _part(report, job, partial(do, report))
    return report


def _part(report: Report, job: str, do: Callable[[], None]) -> None:
    """Run one job and mark its rows, so that it can be run again by itself."""
    rows, claims = len(report.rows), len(report.claims)
    begin = time.perf_counter()
    do()
    print(f"{job}: {time.perf_counter() - begin:.0f} s", flush=True)
    for entry in (*report.rows[rows:], *report.claims[claims:]):
        entry["part"] = job


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--peak"]:
        _peak(arguments[1])
    else:
        finished = main(tuple(arguments) or JOBS)
        finished.show()
        print(f"written to {finished.save()}")
