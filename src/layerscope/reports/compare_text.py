"""What a comparison of runs says in words: its verdict, its depths, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerscope.measures.comparability import Refusal
from layerscope.measures.cross_model import ONSET, CrossModel, MilestoneComparison
from layerscope.measures.paired_medians import Median
from layerscope.reports.text import visible


def names_of(found: CrossModel) -> list[str]:
    """Return the runs' names for display."""
    return [visible(reading.label, keep_spaces=True) for reading in found.readings]


def verdict(found: CrossModel) -> str:
    """Say in a few sentences what the comparison shows, or why it shows nothing."""
    onset = found.by_lens[found.lens][ONSET]
    names = names_of(found)
    compared = [run for run, entry in enumerate(onset.runs) if entry.refused is None]
    if not compared:
        reasons = [f"{names[run]}: {entry.refused}" for run, entry in enumerate(onset.runs)]
        return "Onsets may not be compared. " + "; ".join(reasons) + "."
    parts: list[str] = []
    for run in compared:
        entry = onset.runs[run]
        where = "never" if entry.median is None else f"{entry.median:.2f} of the depth"
        some = f" ({entry.found} of {entry.n} facts)" if 0 < entry.found < entry.n else ""
        parts.append(f"{where} in {names[run]}{some}")
    facts = f"{len(onset.facts)} fact{'' if len(onset.facts) == 1 else 's'}"
    lines = [f"Onset of the answer, median of {facts}: {', '.join(parts)}."]
    lines += [line for run in compared[1:] if (line := _told_apart(onset, run, names))]
    left_out = [names[run] for run in range(len(names)) if run not in compared]
    if left_out:
        lines.append(f"Left out: {', '.join(left_out)}.")
    return " ".join(lines)


def _told_apart(onset: MilestoneComparison, run: int, names: Sequence[str]) -> str | None:
    gap = onset.differences[run]
    if gap is None or gap.median is None:
        return None
    here, there = names[run], names[gap.base]
    if gap.low == gap.high == 0.0:
        return f"{here} has it at the same depth as {there}."
    if gap.resolved:
        when = "later" if gap.median > 0 else "earlier"
        return f"{here} is {abs(gap.median):.2f} of the depth {when} than {there}."
    return (
        f"{here} cannot be told from {there}: one row is up to {gap.row:.2f} of the depth, and "
        f"the interval of the difference is {gap.low:+.2f} to {gap.high:+.2f}."
    )


def depth_text(entry: Median) -> str:
    """Write a median depth with its interval, and how many facts reach the milestone."""
    if entry.median is None:
        return "never"
    text = f"{entry.median:.2f}"
    if entry.low is not None and entry.high is not None:
        text += f" [{entry.low:.2f}, {entry.high:.2f}]"
    return text if entry.found == entry.n else f"{text} ({entry.found}/{entry.n})"


def refusals_told(found: CrossModel) -> list[tuple[str, str, str, str]]:
    """Return run, what, why and what to do; facts refused for the same reason stand together."""
    names = names_of(found)
    grouped: dict[tuple[Any, ...], list[Refusal]] = {}
    for entry in found.refusals:
        place = (entry.run, entry.code, entry.lens, entry.kinds, _general(entry))
        grouped.setdefault(place, []).append(entry)
    return [
        (
            names[entries[0].run],
            _what(entries),
            visible(entries[0].reason, keep_spaces=True),
            entries[0].action,
        )
        for entries in grouped.values()
    ]


def _general(entry: Refusal) -> str:
    """Return a reason by which refusals of several facts belong together."""
    return entry.code if entry.fact is not None and entry.code != "tokenisation" else entry.reason


def _what(entries: Sequence[Refusal]) -> str:
    first = entries[0]
    names: dict[tuple[str, ...], str] = {
        ("kl", "probability"): "KL thresholds and what rests on probabilities",
        ("probability",): "what rests on probabilities",
        ("confirmed",): "confirmed onsets",
        ("kl",): "KL thresholds",
    }
    kinds = names.get(first.kinds, "everything")
    what = f"{kinds} through the {first.lens} lens" if first.lens else kinds
    facts = [visible(entry.fact, keep_spaces=True) for entry in entries if entry.fact is not None]
    if not facts:
        return what
    shown = ", ".join(facts[:5]) + (f" and {len(facts) - 5} more" if len(facts) > 5 else "")
    return f"{what} of {shown}"
