"""What hooks cost: nothing attached, residuals or every site captured, an edit, steered generation.

    python -m benchmarks install hooks

Every library runs in a process and an environment of its own, beside the plain Hugging Face model.
They take turns; ratios are over the bare forward of the same process in the same turn, so that
neither the place of weights in memory nor other work on the machine is charged to a library.
A result is compared with Hugging Face before it is timed; one that differs is reported, not timed.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import SETTLE_S, Report, Timing, paired_ratio, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.environments import Process

LIBRARIES = (
    "huggingface",
    "layerscope",
    "transformer-lens",
    "nnsight",
    "interp-engine",
    "pyvene",
    "steering-vectors",
)
DECODE = ("decode", "decode, no edit")
BARE, AGAIN = "bare", "bare, again"
RESIDUALS_BOUND = 1.03
EVERY_SITE_BOUND = 1.30
DECODE_BOUND = 0.95


@dataclass
class Contender:
    """One library in its process, and the seconds of its jobs by (job, tokens)."""

    library: str
    process: Process
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    checks: dict[tuple[str, int], dict[str, Any]] = field(
        default_factory=dict[tuple[str, int], dict[str, Any]]
    )
    seconds: dict[tuple[str, int], list[float]] = field(
        default_factory=dict[tuple[str, int], list[float]]
    )

    @staticmethod
    def start(library: str, tokens: tuple[int, ...]) -> Contender:
        counts = [str(count) for count in tokens]
        arguments = ["-m", "benchmarks.peers.hooks.worker", library, str(llama_12x768())]
        return Contender(library, Process(library, [*arguments, "--tokens", *counts]))

    def _ask(self, do: str, job: str, tokens: int) -> dict[str, Any]:
        return self.process.ask(json.dumps({"do": do, "job": job, "tokens": tokens}))

    def check(self, tokens: tuple[int, ...]) -> list[str]:
        """Let every job that gives what Hugging Face gives take part; return the others."""
        self.about = self.process.ask(json.dumps({"do": "list"}))
        refused: list[str] = []
        for count in tokens:
            for job in self.about["jobs"]:
                if job in DECODE and count != tokens[0]:
                    continue
                verdict = self._ask("check", job, count)
                if verdict["right"]:
                    self.checks[job, count] = verdict
                    self.seconds[job, count] = []
                else:
                    refused.append(f"{self.library}, {job}, T={count}: {verdict['why']}; not timed")
        return refused

    def turn(self, jobs: list[str], tokens: int, shift: int) -> None:
        """Run each of the given jobs once, from a shifting start."""
        jobs = [job for job in jobs if (job, tokens) in self.seconds]
        if not jobs:
            return
        # The process before left the caches full of its own.
        self._ask("run", BARE, tokens)
        for job in jobs[shift % len(jobs) :] + jobs[: shift % len(jobs)]:
            time.sleep(SETTLE_S)
            self.seconds[job, tokens].append(self._ask("run", job, tokens)["seconds"])

    def timings(self, tokens: int) -> dict[str, Timing]:
        return {
            job: Timing(tuple(seconds))
            for (job, count), seconds in self.seconds.items()
            if count == tokens
        }


def main(
    *,
    rounds: int = 3,
    close_rounds: int = 14,
    decode_rounds: int = 2,
    tokens: tuple[int, ...] = (64, 256),
) -> Report:
    set_threads()
    report = Report("hooks")
    contenders: list[Contender] = []
    try:
        for library in LIBRARIES:
            try:
                contenders.append(Contender.start(library, tokens))
            except FileNotFoundError:
                report.remarks.append(f"{library} is not installed")
        for contender in contenders:
            contender.process.wait()
        for contender in contenders:
            report.remarks += contender.check(tokens)
        _race(contenders, tokens, rounds, decode_rounds)
        ours = next(each for each in contenders if each.library == "layerscope")
        # The bounds are narrower than what a few rounds can tell: more, of our own process alone.
        for turn in range(close_rounds):
            for count in tokens:
                ours.turn([BARE, AGAIN, "idle", "residuals", "every site"], count, turn)
        for turn in range(decode_rounds):
            ours.turn(list(DECODE), tokens[0], turn)
    finally:
        for contender in contenders:
            contender.process.stop()
    for count in tokens:
        _add_rows(report, contenders, count)
        _claim_forward(report, ours, count)
    _add_decode_rows(report, contenders, tokens[0])
    _claim_decode(report, ours, tokens[0])
    left = ours.about["idle_hooks"] + ours.about["idle_forwards_replaced"]
    report.claim("hooks and stand-ins left on an idle model", left, 0)
    return report


def _race(
    contenders: list[Contender], tokens: tuple[int, ...], rounds: int, decode_rounds: int
) -> None:
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            jobs = [job for job in contender.about["jobs"] if job not in DECODE]
            for count in tokens:
                contender.turn(jobs, count, turn)
    for turn in range(decode_rounds):
        shift = turn % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            contender.turn(list(DECODE), tokens[0], turn)


def _add_rows(report: Report, contenders: list[Contender], tokens: int) -> None:
    """Add what every job of a forward pass took, over the bare forward of the same process."""
    for job in (BARE, AGAIN, "idle", "residuals", "every site", "edit"):
        for contender in contenders:
            timings = contender.timings(tokens)
            if job in timings:
                verdict = contender.checks[job, tokens]
                notes = {key: value for key, value in verdict.items() if key != "right"}
                about = {key: value for key, value in contender.about.items() if key != "jobs"}
                report.add(
                    f"{job}, T={tokens}",
                    {contender.library: timings[job]},
                    **about,
                    **notes,
                    ratio=_ratio(timings[job], timings[BARE]),
                )


def _add_decode_rows(report: Report, contenders: list[Contender], tokens: int) -> None:
    """Add what 64 tokens took, over transformers' own loop without an edit."""
    plain = contenders[0].timings(tokens)["decode, no edit"]
    for job in reversed(DECODE):
        for contender in contenders:
            timing = contender.timings(tokens).get(job)
            if timing is not None:
                ids = contender.checks[job, tokens]["tokens"]
                report.add(
                    f"{job}, 64 tokens",
                    {contender.library: timing},
                    version=contender.about["version"],
                    tokens_per_s=len(ids) / timing.median,
                    ratio=_ratio(timing, plain),
                )


def _claim_forward(report: Report, ours: Contender, tokens: int) -> None:
    timings = ours.timings(tokens)
    noise = _noise(timings)
    report.remarks.append(
        f"T={tokens}: two runs of the same bare forward differ by {noise:.4f} (95 % interval of "
        f"the median ratio, {len(timings[BARE].seconds)} rounds)"
    )
    for job, text, bound in (
        ("idle", "nothing captured", round(1 + noise, 4)),
        ("residuals", "every residual", RESIDUALS_BOUND),
        ("every site", "every site", EVERY_SITE_BOUND),
    ):
        ratio = _ratio(timings[job], timings[BARE])
        report.claim(f"{text} / bare forward, T={tokens}", ratio, bound)


def _claim_decode(report: Report, ours: Contender, tokens: int) -> None:
    timings = ours.timings(tokens)
    if "decode" in timings:
        ratio = _ratio(timings["decode, no edit"], timings["decode"])
        text = "steered greedy decode, tokens per second / transformers' generate without an edit"
        report.claim(text, ratio, DECODE_BOUND, at_most=False)


def _ratio(job: Timing, base: Timing) -> float:
    """Return the median ratio of two jobs over the turns that both took part in, the first ones."""
    rounds = min(len(job.seconds), len(base.seconds))
    pair = {"job": Timing(job.seconds[:rounds]), "base": Timing(base.seconds[:rounds])}
    return paired_ratio(pair, "job", "base")


def _noise(timings: dict[str, Timing]) -> float:
    """Return how far from 1 the median ratio of two equal jobs may lie, at 95 %."""
    pairs = zip(timings[AGAIN].seconds, timings[BARE].seconds, strict=True)
    ratios = [again / bare for again, bare in pairs]
    median = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(ratio - median) for ratio in ratios)
    # Standard error of a median: 1.2533 times that of a mean.
    return abs(median - 1) + 1.96 * 1.2533 * spread / len(ratios) ** 0.5
