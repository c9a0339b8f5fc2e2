"""Patching sweeps beside one forward per cell, positions batched per layer, and TransformerLens.

    python -m benchmarks install transformer-lens patching
    python -m benchmarks.bench_patching JOB...     only some jobs; the others' rows are kept

Jobs: resid-llama-16, resid-llama-64, resid-gpt2-16, resid-gpt2-64, heads, rome, memory. Every
contender's numbers are compared with those of single forwards before its times are believed.

What costs the same for every cell (or layer) and would take minutes is timed on a sample of them
and multiplied: rows say so. Two prompts whose tokens all differ: no cell is idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    RESULTS,
    Report,
    Timing,
    interleave,
    paired_ratio,
    peak_rss_bytes,
    set_threads,
)
from benchmarks.models import gpt2_12x768, llama_12x768

MODELS: dict[str, Callable[[], Path]] = {"llama": llama_12x768, "gpt2": gpt2_12x768}
JOBS = ("resid-llama-16", "resid-llama-64", "resid-gpt2-16", "resid-gpt2-64", "heads", "rome")
ANSWER, FOIL = 7, 11
ONE, BATCHED = "one forward per cell", "positions batched per layer"
PEER, OURS, CHECKED = "TransformerLens", "layerscope", "layerscope, checked products"


def main(jobs: Sequence[str] = (*JOBS, "memory")) -> Report:
    set_threads()
    report = Report("patching")
    path = RESULTS / "patching.json"
    if path.exists() and set(jobs) != {*JOBS, "memory"}:
        kept = json.loads(path.read_text())
        report.rows = [row for row in kept["rows"] if row["part"] not in jobs]
        report.claims = [claim for claim in kept["claims"] if claim["part"] not in jobs]
        report.remarks = kept.get("remarks", [])
    for job in jobs:
        before = len(report.rows), len(report.claims)
        if job.startswith("resid"):
            _, name, tokens = job.split("-")
            _resid(report, name, int(tokens))
        else:
            {"heads": _heads, "rome": _rome, "memory": _memory}[job](report)
        for row in report.rows[before[0] :]:
            row["part"] = job
        for claim in report.claims[before[1] :]:
            claim["part"] = job
    return report


def _load(name: str) -> Any:
    import layerscope

    return layerscope.load(MODELS[name](), device="cpu", dtype="float32", verify=False)


def _prompts(tokens: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randperm(30_000, generator=generator)[: 2 * tokens].view(2, tokens) + 20


def _difference(logits: Any) -> Any:
    return logits[..., ANSWER] - logits[..., FOIL]


def _blocks(model: Any) -> Any:
    hf = model.backend.model
    return hf.model.layers if hasattr(hf, "model") else hf.transformer.h


def _residuals(model: Any, ids: Any) -> Any:
    return [
        value[0]
        for value in model.run(ids, capture="resid_pre.*", logits=None).activations.values()
    ]


def _resid(report: Report, name: str, tokens: int) -> None:
    """Layer x position at resid_pre, clean into corrupt, logit difference."""
    import torch

    model = _load(name)
    clean, corrupt = _prompts(tokens)[:, None]
    n_layers, long = model.n_layers, tokens > 16
    every, layers_timed = (24, 2) if long else (3, n_layers)
    cells = [(layer, at) for layer in range(n_layers) for at in range(tokens)]
    hf = model.backend.model
    found: dict[str, Any] = {}

    def hooked(layer: int, put: Callable[[Any], None], ids: Any, **options: Any) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> Any:
            value = (args[0] if args else kwargs["hidden_states"]).clone()
            put(value)
            if args:
                return (value, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": value}

        handle = _blocks(model)[layer].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                return _difference(hf(input_ids=ids, use_cache=False, **options).logits[:, -1])
        finally:
            handle.remove()

    def single(cell: tuple[int, int], donor: Any) -> Any:
        layer, at = cell

        def put(value: Any) -> None:
            value[0, at] = donor[layer][at]

        return hooked(layer, put, corrupt)

    def one() -> None:
        donor = _residuals(model, clean)
        found[ONE] = torch.cat([single(cell, donor) for cell in cells[::every]])

    def batched() -> None:
        donor = _residuals(model, clean)
        values = []
        for layer in range(layers_timed):

            def put(value: Any, layer: int = layer) -> None:
                places = torch.arange(tokens)
                value[places, places] = donor[layer]

            ids = corrupt.expand(tokens, -1)
            values.append(hooked(layer, put, ids, logits_to_keep=1))
        found[BATCHED] = torch.cat(values)

    def ours(products: str, label: str) -> None:
        found[label] = _ours(model, clean, corrupt, products)

    contenders = {
        ONE: one,
        BATCHED: batched,
        OURS: partial(ours, "default", OURS),
        CHECKED: partial(ours, "checked", CHECKED),
    }
    first = {label: contenders.pop(label) for label in (ONE,)}
    timings = interleave(first, rounds=1 if long else 2, warmup=0 if long else 1)
    timings |= interleave(contenders, rounds=2 if long else 5, warmup=0 if long else 1)
    timings = {
        ONE: _times(timings[ONE], every),
        BATCHED: _times(timings[BATCHED], n_layers / layers_timed),
        OURS: timings[OURS],
        CHECKED: timings[CHECKED],
    }
    peer = _peer(name, clean, corrupt, every)
    if peer is not None:
        found[PEER], timings[PEER] = peer
    _settle(report, f"{len(cells)} cells, {name}, T={tokens}", found, timings, every)


def _settle(
    report: Report,
    job: str,
    found: dict[str, Any],
    timings: dict[str, Timing],
    every: int,
) -> None:
    """Compare every contender's numbers with those of single forwards, and its times."""
    exact = found[ONE]
    batched = found[BATCHED][::every]
    errors = {
        ONE: 0.0,
        BATCHED: _error(batched, exact[: len(batched)]),
        OURS: _error(found[OURS][::every], exact),
        CHECKED: _error(found[CHECKED][::every], exact),
    }
    if PEER in found:
        errors[PEER] = _error(found[PEER], exact)
    sampled = {ONE: every, PEER: every, BATCHED: len(found[OURS]) // len(found[BATCHED])}
    for label, timing in timings.items():
        share = sampled.get(label, 1)
        report.add(
            job,
            {label: timing},
            ratio=timing.median / timings[ONE].median,
            error=errors[label],
            sampled=f"one in {share}" if share > 1 else "all",
        )
    report.claim(f"largest difference to single forwards, {job}", errors[OURS], 1e-4)
    ratio = paired_ratio(timings, BATCHED, OURS)
    report.claim(f"faster than positions batched per layer, {job}", ratio, 3.0, at_most=False)
    if PEER in found:
        ratio = timings[PEER].median / timings[OURS].median
        report.claim(f"faster than TransformerLens, {job}", ratio, 10.0, at_most=False)


def _ours(model: Any, clean: Any, corrupt: Any, products: str) -> Any:
    from layerscope.interventions.patching import (
        Place,
        PromptPair,
        Targets,
        TokenPair,
        nodes_of,
        sweep,
    )

    ids = [tuple(row[0].tolist()) for row in (clean, corrupt)]
    pair = TokenPair(
        PromptPair(key="random", clean="", corrupt=""),
        ids[0],
        ids[1],
        Targets((ANSWER,), (FOIL,)),
        ("",) * len(ids[0]),
        tuple(Place(str(at), at, at) for at in range(len(ids[0]))),
        0,
    )
    nodes = nodes_of(model, pair, "resid_pre")
    return sweep(model, pair, nodes, ["logit_diff"], products=products).cells[:, 0]


def _peer(name: str, clean: Any, corrupt: Any, every: int) -> tuple[Any, Timing] | None:
    import torch

    from benchmarks.peers.environments import ROOT, python_of

    python = python_of("transformer-lens")
    if python is None:
        return None
    tokens = clean.shape[1]
    command = [str(python), "-m", "benchmarks.peers.patching_worker", str(MODELS[name]())]
    request = {
        "clean": clean[0].tolist(),
        "corrupt": corrupt[0].tolist(),
        "answer": ANSWER,
        "foil": FOIL,
        "every": every,
    }
    rounds = 1 if tokens > 16 else 2
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        _said(process.stdout)
        answers = []
        for _ in range(rounds):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answers.append(_said(process.stdout))
        process.stdin.close()
    seconds = tuple(answer["seconds"] for answer in answers)
    return torch.tensor(answers[-1]["values"], dtype=torch.float64), Timing(seconds)


def _said(stream: Any) -> Any:
    """Return the next line of JSON, past whatever else the peer prints."""
    for line in stream:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("the peer ended without an answer")


def _heads(report: Report) -> None:
    """Every head's z at the last position, one at a time."""
    for name, tokens in (("llama", 16), ("llama", 64), ("gpt2", 16)):
        _heads_of(report, name, tokens)


def _heads_of(report: Report, name: str, tokens: int) -> None:
    import torch

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

    model = _load(name)
    prompts = _prompts(tokens)
    hf, n_heads = model.backend.model, model.n_heads
    width = model.d_model // n_heads
    nodes = [(layer, head) for layer in range(model.n_layers) for head in range(n_heads)]
    every = 3 if tokens == 16 else 12
    found: dict[str, Any] = {}

    def out(layer: int) -> Any:
        block = _blocks(model)[layer]
        return block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj

    def single(layer: int, head: int, value: Any) -> Any:
        def hook(_module: Any, args: Any) -> Any:
            changed = args[0].clone()
            changed[0, -1, head * width : (head + 1) * width] = value
            return (changed,)

        handle = out(layer).register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = hf(input_ids=prompts[1:], use_cache=False).logits
        handle.remove()
        return _difference(logits[:, -1])

    def naive() -> None:
        donor = model.run(prompts[:1], capture="attn.*.z", logits=None)
        found[ONE] = torch.cat(
            [single(at, head, donor[f"attn.{at}.z"][0, -1, head]) for at, head in nodes[::every]]
        )

    def ours() -> None:
        runs = record(model, batch_of(prompts.tolist()), capture="attn.*.z")
        reader = Reader(model, (metric_of("logit_diff"),), (Targets((ANSWER,), (FOIL,)),) * 2)
        last = tokens - 1
        cells = []
        for layer, head in nodes:
            site = _site("attn.z", layer)
            value = runs.value(site)[0, last:, head]
            cells.append(Cell((Patch(site, (last,), value, head),), 1))
        found[OURS] = run_cells(runs, cells, reader)[:, 0]

    timings = interleave({ONE: naive, OURS: ours}, rounds=2)
    timings[ONE] = _times(timings[ONE], every)
    error = _error(found[OURS][::every], found[ONE])
    job = f"{len(nodes)} heads at the last position, {name}, T={tokens}"
    report.add(job, timings, error=error, sampled=f"one in {every}" if every > 1 else "all")
    report.claim(f"largest difference to single forwards, {job}", error, 1e-4)
    ratio = timings[ONE].median / timings[OURS].median
    report.claim(f"faster than one forward per head, {job}", ratio, 20.0, at_most=False)


def _rome(report: Report) -> None:
    """All three grids of causal tracing, ten noisy rows."""
    import torch

    from layerscope.interventions.patching.tracing import (
        RESTORED,
        Subject,
        record_noisy,
        trace,
        trace_cells,
    )
    from layerscope.models import Add, Replace

    model, tokens, every = _load("llama"), 16, 24
    subject = Subject(tuple(_prompts(tokens)[0].tolist()), (2, 3, 4), ANSWER)
    grid = [
        cell for restore in ("state", "mlp", "attn") for cell in trace_cells(model, tokens, restore)
    ]
    chosen = grid[::every]
    found: dict[str, Any] = {}

    def naive() -> None:
        clean, noisy = record_noisy(model, subject, chosen, noise=0.1)
        ids = torch.tensor([subject.ids] * 11)
        (noise,) = noisy.edits
        add = Add("embed", noise.value, rows=range(1, 11), positions=noise.positions)
        values = []
        for cell in chosen:
            kind = RESTORED[cell.restore]
            edits = [
                Replace(
                    f"{kind}.{layer}",
                    value=clean.value(_site(kind, layer))[0, cell.position],
                    rows=range(1, 11),
                    positions=cell.position,
                )
                for layer in cell.layers
            ]
            logits = model.run(ids, edits=[add, *edits], logits="last").logits[1:, -1]
            values.append(logits.double().softmax(-1)[:, ANSWER])
        found[ONE] = torch.stack(values)

    def ours() -> None:
        found[OURS] = trace(model, subject, grid, noise=0.1).restored

    timings = interleave({ONE: naive, OURS: ours}, rounds=2, warmup=0)
    timings[ONE] = _times(timings[ONE], len(grid) / len(chosen))
    error = _error(found[OURS][::every], found[ONE])
    job = f"{len(grid)} cells of causal tracing, llama, T={tokens}"
    report.add(job, timings, error=error, sampled=f"one in {every}")
    report.claim(f"largest difference to single passes, {job}", error, 1e-6)
    ratio = timings[ONE].median / timings[OURS].median
    report.claim(f"faster than one pass of 11 rows per cell, {job}", ratio, 10.0, at_most=False)


def _site(kind: str, layer: int) -> Any:
    from layerscope.models import Site

    return Site(kind, layer)


def _memory(report: Report) -> None:
    """Peak memory of the sweep beside that of one batched forward that keeps its cache."""
    peaks: dict[str, int] = {}
    for what in ("forward", "sweep"):
        command = [sys.executable, "-m", "benchmarks.bench_patching", "--peak", what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[what] = int(done.stdout.split()[-1])
    report.rows.append(
        {
            "job": "peak memory, 768 cells, llama, T=64",
            "contender": OURS,
            **Timing((0.0,)).to_dict(),
            "ratio": peaks["sweep"] / peaks["forward"],
            "forward_bytes": peaks["forward"],
            "sweep_bytes": peaks["sweep"],
        }
    )
    ratio = peaks["sweep"] / peaks["forward"]
    report.claim("peak memory over one batched forward and its cache", ratio, 1.5)


def _peak(what: str) -> None:
    """Print by how many bytes a job raises the peak over that of a plain forward."""
    import torch

    set_threads()
    model = _load("llama")
    clean, corrupt = _prompts(64)[:, None]
    with torch.no_grad():
        model.backend.model(input_ids=corrupt, use_cache=False)
    before = peak_rss_bytes()
    if what == "forward":  # what positions batched per layer hold at once
        with torch.no_grad():
            model.backend.model(input_ids=corrupt.expand(64, -1), use_cache=True, logits_to_keep=1)
    else:
        _ours(model, clean, corrupt, "default")
    print(peak_rss_bytes() - before)  # the last word of this process


def _times(timing: Timing, factor: float) -> Timing:
    return Timing(tuple(seconds * factor for seconds in timing.seconds))


def _error(values: Any, exact: Any) -> float:
    return float((values.double().cpu() - exact.double().cpu()).abs().max())


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--peak"]:
        _peak(arguments[1])
    else:
        begin = time.perf_counter()
        finished = main(tuple(arguments) or (*JOBS, "memory"))
        finished.show()
        print(f"written to {finished.save()} after {time.perf_counter() - begin:.0f} s")
