"""The whole lens, forward pass included, and capturing, against the peers.

    python -m benchmarks lens

All contenders wait in processes of their own and take turns on the same random 12-layer Llama.
Ours computes more than any peer: KL both ways, Jensen-Shannon, L1, cosines, ranks, masses.
"""

from __future__ import annotations

from benchmarks.harness import Report, paired_ratio, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.environments import race

LENS = [
    "transformer-lens:lens",
    "layerscope:lens",
    "layerscope:lens-checked",
    "huggingface:lens",
    "nnterp:lens",
    "tuned-lens:lens",
]
CAPTURE = [
    "huggingface:forward",
    "layerscope:forward",
    "layerscope:capture",
    "transformer-lens:capture",
    "nnterp:capture",
]
LAST = ["huggingface:last", "layerscope:last", "layerscope:last-checked"]
ENTROPY_TOLERANCE_BITS = 1e-3


def main(*, rounds: int = 7, tokens: tuple[int, ...] = (64, 256)) -> Report:
    set_threads()
    folder = llama_12x768()
    report = Report("lens")
    for count in tokens:
        timings, notes = race(LENS, folder, tokens=count, rounds=rounds)
        report.add(f"whole lens, T={count}", timings)
        for row in report.rows[-len(timings) :]:
            row["peak_rss_mb"] = round(notes[row["contender"]]["peak_rss"] / 2**20)
        _same_entropies(report, notes, count)
        if "transformer-lens:lens" in timings:
            for ours, bound in (("layerscope:lens", 0.75), ("layerscope:lens-checked", 0.45)):
                ratio = paired_ratio(timings, ours, "transformer-lens:lens")
                report.claim(f"{ours} / TransformerLens logit_lens, T={count}", ratio, bound)
        timings, _ = race(CAPTURE, folder, tokens=count, rounds=2 * rounds)
        report.add(f"capture all residuals, T={count}", timings)
    timings, _ = race(LAST, folder, tokens=tokens[0], rounds=2 * rounds)
    report.add("all layers, last position", timings)
    for ours in ("layerscope:last", "layerscope:last-checked"):
        ratio = paired_ratio(timings, "huggingface:last", ours)
        report.claim(f"one unembedding per layer / {ours}", ratio, 4.0, at_most=False)
    return report


def _same_entropies(report: Report, notes: dict[str, dict[str, object]], count: int) -> None:
    """A race between different answers means nothing: entropies must agree."""
    ours = notes["layerscope:lens"]["values"]
    for contender, note in notes.items():
        theirs = note.get("values")
        if not isinstance(theirs, list) or not isinstance(ours, list):
            continue
        if len(theirs) == len(ours):
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            report.claim(
                f"entropy of {contender} equals ours, T={count} (bits)",
                worst,
                ENTROPY_TOLERANCE_BITS,
            )
