"""What of several runs may be compared, and what may not: every refusal with its reason.

Between runs one condition must be the same everywhere. The value that most runs share is taken as
the common one (of equally frequent ones that of the earliest run), and the others are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from layerscope.measures.guidance import CALIBRATION
from layerscope.measures.readings import ALL_KINDS, KINDS, FactReading, Reading
from layerscope.measures.tokens import SPACE_MARKS, is_blank

UNFITTED = ("raw", "norm")
NOT_PROBABILITIES = ("probability",)
RANKS_ONLY = ("kl", "probability")
# Thresholds behind milestones whose names do not say them, and what they decide.
DECIDE = {
    "semantic_margin": "probability",
    "semantic_gap": "probability",
    "copy_threshold": "probability",
    "copy_margin": "probability",
    "copy_window_k": "probability",
    "confirm_window": "confirmed",
}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something of one run that may not be set beside the others.

    `lens` and `fact` are None where it holds for all of them; `kinds` are those of `KINDS`.
    """

    run: int
    code: str
    reason: str
    action: str
    lens: str | None = None
    fact: str | None = None
    kinds: tuple[str, ...] = ALL_KINDS

    def covers(self, lens: str, fact: str, milestone: str) -> bool:
        """Say whether a milestone of a fact through a lens falls under this."""
        return (
            self.lens in (None, lens)
            and self.fact in (None, fact)
            and KINDS[milestone] in self.kinds
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"kinds": list(self.kinds)}


class Refusals:
    """Everything that is refused, quick to ask about one cell."""

    def __init__(self, found: Sequence[Refusal]) -> None:
        self.found = tuple(found)
        self._by_place: dict[tuple[int, str | None], list[Refusal]] = {}
        for entry in found:
            self._by_place.setdefault((entry.run, entry.fact), []).append(entry)

    def of(self, run: int, lens: str, fact: str, milestone: str) -> Refusal | None:
        """Return the first reason not to compare a milestone of a fact; those of the run first."""
        for place in ((run, None), (run, fact)):
            for entry in self._by_place.get(place, ()):
                if entry.covers(lens, fact, milestone):
                    return entry
        return None


def refusals(readings: Sequence[Reading], *, lenses: Sequence[str]) -> list[Refusal]:
    """Return everything that may not be compared, runs first, then single facts."""
    found = [
        *_missing_lenses(readings, lenses),
        *_norms(readings, lenses),
        *_fits(readings, lenses),
        *_thresholds(readings),
        *_dtypes(readings),
        *_probabilities(readings),
        *_confirmations(readings, lenses),
    ]
    for key in fact_keys(readings):
        found += _fact(readings, key)
    return found


def fact_keys(readings: Sequence[Reading]) -> list[str]:
    """Return the facts of all runs, in the order in which they are first met."""
    return list(dict.fromkeys(key for reading in readings for key in reading.facts))


def common(values: Sequence[T]) -> T:
    """Return the most frequent value, the earliest of equally frequent ones."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -values.index(value)))


def _missing_lenses(readings: Sequence[Reading], lenses: Sequence[str]) -> Iterator[Refusal]:
    for run, reading in enumerate(readings):
        present = {lens for fact in reading.facts.values() for lens in fact.lenses}
        for lens in lenses:
            if lens not in present:
                why = (reading.lenses.get(lens) or {}).get("reason") or "it was not asked for"
                yield Refusal(
                    run=run,
                    lens=lens,
                    code="lens_missing",
                    reason=f"there is no {lens} lens in this run: {why}",
                    action=f"Run it again with {lens} among --lens.",
                )


def _norms(readings: Sequence[Reading], lenses: Sequence[str]) -> Iterator[Refusal]:
    for lens in lenses:
        if lens == "raw":
            continue
        have = [run for run, reading in enumerate(readings) if _has(reading, lens)]
        norms = [_norm(readings[run], lens) for run in have]
        for run, norm in zip(have, norms, strict=True):
            if norm != common(norms):
                yield Refusal(
                    run=run,
                    lens=lens,
                    code="norm_choice",
                    reason=f"decoded with the {_known(norm)} norm, the others with the "
                    f"{_known(common(norms))} norm",
                    action=f"Run it again with --norm {common(norms) or 'final'}.",
                )


def _fits(readings: Sequence[Reading], lenses: Sequence[str]) -> Iterator[Refusal]:
    """Yield the fitted lenses that saw other text than those of the other runs."""
    for lens in (lens for lens in lenses if lens not in UNFITTED):
        have = [run for run, reading in enumerate(readings) if _has(reading, lens)]
        texts = [_text(readings[run], lens) for run in have]
        for run, text in zip(have, texts, strict=True):
            if text is None or text != common(texts):
                yield Refusal(
                    run=run,
                    lens=lens,
                    code="lens_text",
                    reason="the text that it was fitted on was not recorded"
                    if text is None
                    else f"fitted on other text ({text[:8]}) than the others "
                    f"({(common(texts) or 'not recorded')[:8]})",
                    action=f"Fit the {lens} lens of every model on the same text.",
                )


def _thresholds(readings: Sequence[Reading]) -> Iterator[Refusal]:
    """Yield the runs whose milestones were found with other thresholds."""
    have = [run for run, reading in enumerate(readings) if reading.thresholds]
    for name, kind in DECIDE.items():
        values = [readings[run].thresholds.get(name) for run in have]
        for run, value in zip(have, values, strict=True):
            if value != common(values):
                yield Refusal(
                    run=run,
                    code="thresholds",
                    reason=f"measured with {name} {value}, the others with {common(values)}",
                    action="Measure all tables with the same thresholds.",
                    kinds=(kind,),
                )


def _dtypes(readings: Sequence[Reading]) -> Iterator[Refusal]:
    dtypes = [reading.dtype for reading in readings]
    for run, reading in enumerate(readings):
        if reading.dtype == common(dtypes) or reading.precision_holds:
            continue
        yield Refusal(
            run=run,
            code="dtype",
            reason=f"computed in {_known(reading.dtype)}, the others in {_known(common(dtypes))}, "
            "and no check of the run shows that its milestones survive another precision: ranks "
            "only",
            action=f"Run it again with --dtype {common(dtypes) or 'float32'}, or with "
            "--diagnostics standard.",
            kinds=RANKS_ONLY,
        )


def _probabilities(readings: Sequence[Reading]) -> Iterator[Refusal]:
    """Yield what rests on probabilities where raw and norm disagree, or the guidance forbids it."""
    for run, reading in enumerate(readings):
        if reading.guidance.get("suppress_abs_probs"):
            codes = [str(entry.get("code")) for entry in reading.guidance.get("reasons") or ()]
            named = [code for code in codes if code in CALIBRATION]
            why = f" ({', '.join(named)})" if named else ""
            yield Refusal(
                run=run,
                code="suppressed",
                reason=f"its guidance asks for ranks instead of probabilities{why}",
                action="Read ranks, KL thresholds and confirmed onsets.",
                kinds=NOT_PROBABILITIES,
            )
            continue
        for key, fact in reading.facts.items():
            if any(entry.tier == "high" for entry in fact.lenses.values()):
                yield Refusal(
                    run=run,
                    fact=key,
                    code="artefact_high",
                    reason="raw and norm lens disagree strongly (artefact tier high)",
                    action="Read ranks, KL thresholds and confirmed onsets.",
                    kinds=NOT_PROBABILITIES,
                )


def _confirmations(readings: Sequence[Reading], lenses: Sequence[str]) -> Iterator[Refusal]:
    """Yield the onsets that other lenses could confirm than in the other runs."""
    for lens in lenses:
        able = [_confirming(reading, lens) for reading in readings]
        known = [entry for entry in able if entry is not None]
        if not known:
            continue
        for run, entry in enumerate(able):
            if entry is not None and entry != common(known):
                yield Refusal(
                    run=run,
                    lens=lens,
                    code="confirmed_by_others",
                    reason=f"its onsets could be confirmed by {_listed(entry)}, those of the "
                    f"others by {_listed(common(known))}",
                    action="Run all of them with the same lenses.",
                    kinds=("confirmed",),
                )


def _fact(readings: Sequence[Reading], key: str) -> Iterator[Refusal]:
    """Yield the first thing that keeps one fact of each run from being compared."""
    asked = [reading.facts[key] for reading in readings if key in reading.facts]
    usable = [fact for fact in asked if _unusable(fact) is None]
    for run, reading in enumerate(readings):
        fact = reading.facts.get(key)
        if fact is None:
            yield Refusal(
                run=run,
                fact=key,
                code="not_asked",
                reason="not asked in this run, or left out of it",
                action="Run all models on the same prompts.",
            )
            continue
        problem = _unusable(fact) or next(
            (found for rule in _SAME if (found := rule(fact, usable)) is not None), None
        )
        if problem is not None:
            code, reason, action = problem
            yield Refusal(run=run, fact=key, code=code, reason=reason, action=action)


Problem = tuple[str, str, str]


def _unusable(fact: FactReading) -> Problem | None:
    if fact.alignment != "ok" or fact.first_piece is None:
        return (
            "not_aligned",
            f"its answer has no rank: {fact.alignment}",
            "Give an answer that follows the prompt in whole tokens.",
        )
    if is_blank(fact.first_piece):
        return (
            "answer_blank",
            f"the first token of its answer is only white space ({_pieces(fact)}), so that its "
            "rank is not the answer's",
            "Choose answers that begin with a token of letters.",
        )
    return None


def _text_differs(fact: FactReading, asked: Sequence[FactReading]) -> Problem | None:
    if fact.text == common([other.text for other in asked]):
        return None
    return ("prompt", "asked in other words", "Run all models on the same prompts.")


def _form_differs(fact: FactReading, asked: Sequence[FactReading]) -> Problem | None:
    usual = common([other.form for other in asked])
    if fact.form == usual:
        return None
    return (
        "format",
        f"asked as {fact.form}, the others as {usual}",
        "Run all models with the same --format, --task and --system.",
    )


def _answer_differs(fact: FactReading, asked: Sequence[FactReading]) -> Problem | None:
    usual = common([first_token(other) for other in asked])
    if first_token(fact) == usual:
        return None
    return (
        "tokenisation",
        f"its answer begins with the token “{first_token(fact)}” ({_pieces(fact)}), in the others "
        f"with “{usual}”: not the same event",
        "Compare facts whose answers begin with the same token in every tokenizer.",
    )


_SAME: tuple[Callable[[FactReading, Sequence[FactReading]], Problem | None], ...] = (
    _text_differs,
    _form_differs,
    _answer_differs,
)


def first_token(fact: FactReading) -> str:
    """Return the text of the answer's first token without the space in front of it."""
    return (fact.first_piece or "").translate(SPACE_MARKS).strip()


def _pieces(fact: FactReading) -> str:
    return "one token" if fact.n_pieces == 1 else f"{fact.n_pieces} tokens"


def _has(reading: Reading, lens: str) -> bool:
    return any(lens in fact.lenses for fact in reading.facts.values())


def _norm(reading: Reading, lens: str) -> str | None:
    return (reading.lenses.get(lens) or {}).get("norm") or reading.norm_choice


def _text(reading: Reading, lens: str) -> str | None:
    corpus = (reading.lenses.get(lens) or {}).get("corpus") or {}
    return corpus.get("text_sha256") or corpus.get("ids_sha256")


def _confirming(reading: Reading, lens: str) -> tuple[str, ...] | None:
    for fact in reading.facts.values():
        if lens in fact.lenses and fact.lenses[lens].confirming is not None:
            return fact.lenses[lens].confirming
    return None


def _listed(lenses: Sequence[str]) -> str:
    return " and ".join(lenses) or "no lens"


def _known(value: str | None) -> str:
    return "an unrecorded kind" if value is None else value
