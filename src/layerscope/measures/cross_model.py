"""Several runs side by side: at which share of the depth milestones lie, and what that rests on.

Depths are row / n_layers. Medians are over the facts that all compared runs may be compared on, of
those that reach the milestone; how many do stands beside. Intervals are 2.5 and 97.5 percentiles of
a seeded bootstrap over facts (Efron, 1979), the same draw for every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from layerscope.errors import TableError
from layerscope.measures.comparability import Refusal, Refusals, fact_keys, first_token, refusals
from layerscope.measures.detectors import median, percentile_row
from layerscope.measures.paired_medians import (
    Difference,
    Median,
    difference_of,
    draws,
    median_of,
)
from layerscope.measures.readings import KINDS, FactReading, Reading
from layerscope.measures.runs_described import changed, describe
from layerscope.measures.table import LENS_ORDER

ONSET = "L_semantic"
RESAMPLES = 2000


@dataclass(frozen=True)
class MilestoneComparison:
    """One milestone through one lens in every run."""

    facts: tuple[str, ...]  # that entered the medians
    runs: tuple[Median, ...]
    differences: tuple[Difference | None, ...]  # None for the base, and for runs left out


@dataclass(frozen=True)
class Cell:
    """One fact's milestone in one run: depth and row (None: never), or why it is not compared."""

    depth: float | None = None
    row: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Absolute:
    """A figure that means something within one model only; `refused` says why it is grey."""

    name: str
    values: tuple[float | None, ...]
    refused: str | None


@dataclass(frozen=True)
class CrossModel:
    """All of a comparison; see `compare`."""

    readings: tuple[Reading, ...]
    lens: str
    lenses: tuple[str, ...]
    facts: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    same_model: bool
    by_lens: Mapping[str, Mapping[str, MilestoneComparison]]
    groups: Mapping[str, MilestoneComparison]  # the onset by relation and language of a battery
    absolute: tuple[Absolute, ...]

    def cell(self, run: int, fact: str, milestone: str, lens: str | None = None) -> Cell:
        """Return one fact's milestone in one run through a lens, by default the main one."""
        return _cell(self.readings, self._index, run, fact, milestone, lens or self.lens)

    @cached_property
    def _index(self) -> Refusals:
        return Refusals(self.refusals)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = [reading.label for reading in self.readings]
        return {
            "runs": [describe(reading) for reading in self.readings],
            "same_model": self.same_model,
            "changed": [
                {
                    "model": change.model,
                    "labels": [names[run] for run in change.runs],
                    "options": {option: list(values) for option, values in change.options},
                }
                for change in changed(self.readings)
            ],
            "lens": self.lens,
            "lenses": list(self.lenses),
            "milestones": {
                lens: {name: _milestone_dict(entry, names) for name, entry in found.items()}
                for lens, found in self.by_lens.items()
            },
            "groups": {name: _milestone_dict(entry, names) for name, entry in self.groups.items()},
            "facts": [_fact_dict(self, key) for key in self.facts],
            "not_comparable": [
                {"label": names[entry.run], **entry.to_dict()} for entry in self.refusals
            ],
            "absolute": [asdict(entry) for entry in self.absolute],
        }


def compare(
    readings: Sequence[Reading],
    *,
    lens: str | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> CrossModel:
    """Compare runs by normalised depth, ranks and thresholds, lens by lens.

    Args:
        readings: two or more, with labels that differ.
        lens: the one whose facts are shown; by default norm, else the first run's main lens.
        seed: of the bootstrap. resamples: how many of them.

    Raises:
        TableError: fewer than two runs, or no run has the lens.
    """
    if len(readings) < 2:
        raise TableError("a comparison needs two runs or more; name another one")
    lenses = list(
        dict.fromkeys(
            name for entry in readings for fact in entry.facts.values() for name in fact.lenses
        )
    )
    main = lens or ("norm" if "norm" in lenses else readings[0].primary_lens)
    if main not in lenses:
        raise TableError(f"no run has a {main} lens; there are {', '.join(lenses) or 'none'}")
    lenses.sort(key=lambda name: (name != main, LENS_ORDER.get(name, len(LENS_ORDER))))
    found, keys = tuple(refusals(readings, lenses=lenses)), fact_keys(readings)
    work = _Medians(readings, Refusals(found), seed=seed, resamples=resamples)
    by_group: dict[str, list[str]] = {}
    for key in keys:
        group = next(entry.facts[key].group for entry in readings if key in entry.facts)
        by_group.setdefault(group, []).append(key)
    return CrossModel(
        readings=tuple(readings),
        lens=main,
        lenses=tuple(lenses),
        facts=tuple(keys),
        refusals=found,
        same_model=same_model(readings),
        by_lens={
            name: {
                milestone: work.compare(name, milestone, keys)
                for milestone in KINDS
                if any(_measured(entry, name, milestone) for entry in readings)
            }
            for name in lenses
        },
        groups={group: work.compare(main, ONSET, own) for group, own in by_group.items()}
        if len(by_group) > 1
        else {},
        absolute=tuple(_absolute(readings, found, keys, main)),
    )


def _measured(reading: Reading, lens: str, milestone: str) -> bool:
    return any(
        milestone in fact.lenses[lens].milestones
        for fact in reading.facts.values()
        if lens in fact.lenses
    )


def same_model(readings: Sequence[Reading]) -> bool:
    """Say whether all runs are of the same weights under the same tokenizer, as far as recorded."""
    identities = {(reading.weights, reading.tokenizer) for reading in readings}
    return len(identities) == 1 and readings[0].weights is not None


class _Medians:
    """Medians, intervals and differences over the facts that may be compared."""

    def __init__(
        self, readings: Sequence[Reading], found: Refusals, *, seed: int, resamples: int
    ) -> None:
        self.readings, self.found = readings, found
        self.seed, self.resamples = seed, resamples

    def compare(self, lens: str, milestone: str, keys: Sequence[str]) -> MilestoneComparison:
        """Compare one milestone; a run that may be compared on no fact is left out."""
        cells = [
            [_cell(self.readings, self.found, run, key, milestone, lens) for key in keys]
            for run in range(len(self.readings))
        ]
        active = [run for run, row in enumerate(cells) if any(cell.refused is None for cell in row)]
        if len(active) < 2:
            return self._nothing(cells)
        chosen = [
            at for at in range(len(keys)) if all(cells[run][at].refused is None for run in active)
        ]
        depths = np.array(
            [
                [np.nan if (d := cells[run][at].depth) is None else d for at in chosen]
                for run in active
            ]
        ).reshape(len(active), len(chosen))
        name = f"{lens}/{milestone}"
        drawn = draws(name, len(chosen), seed=self.seed, resamples=self.resamples)
        medians = [
            median_of(depths[active.index(run)], drawn)
            if run in active
            else _left_out(cells[run], _first_reason(cells[run]))
            for run in range(len(cells))
        ]
        if not chosen:
            why = "no fact may be compared in all runs"
            medians = [
                entry if entry.refused else _left_out(cells[run], why)
                for run, entry in enumerate(medians)
            ]
        return MilestoneComparison(
            facts=tuple(keys[at] for at in chosen),
            runs=tuple(medians),
            differences=self._differences(active, depths, drawn),
        )

    def _nothing(self, cells: Sequence[Sequence[Cell]]) -> MilestoneComparison:
        alone = "no other run may be compared with it"
        return MilestoneComparison(
            facts=(),
            runs=tuple(_left_out(row, _first_reason(row) or alone) for row in cells),
            differences=(None,) * len(cells),
        )

    def _differences(
        self, active: Sequence[int], depths: Float[np.ndarray, "run fact"], drawn: np.ndarray
    ) -> tuple[Difference | None, ...]:
        found: list[Difference | None] = [None] * len(self.readings)
        base = active[0]
        for place, run in enumerate(active[1:], start=1):
            row = max(1.0 / self.readings[at].n_layers for at in (base, run))
            found[run] = difference_of(depths[place] - depths[0], drawn, base=base, row=row)
        return tuple(found)


def _cell(
    readings: Sequence[Reading],
    found: Refusals,
    run: int,
    key: str,
    milestone: str,
    lens: str,
) -> Cell:
    reading = readings[run]
    fact = reading.facts.get(key)
    lensed = fact.lenses.get(lens) if fact is not None else None
    row = lensed.milestones.get(milestone) if lensed is not None else None
    depth = None if row is None else row / reading.n_layers
    refused = found.of(run, lens, key, milestone)
    if refused is not None:
        return Cell(depth, row, refused.reason)
    if lensed is None or milestone not in lensed.milestones:
        return Cell(refused=f"{milestone} was not measured through the {lens} lens in this run")
    return Cell(depth, row)


def _left_out(cells: Sequence[Cell], why: str | None) -> Median:
    """Return the median of a run's own facts, for the record, with why it is not compared."""
    depths = [cell.depth for cell in cells if cell.depth is not None]
    return Median(n=len(cells), found=len(depths), median=median(depths), refused=why)


def _first_reason(cells: Sequence[Cell]) -> str | None:
    """Return the reason that most cells were refused for, the first of these; None without any."""
    reasons = [cell.refused for cell in cells if cell.refused is not None]
    return max(reasons, key=reasons.count) if reasons else None


def _absolute(
    readings: Sequence[Reading], found: Sequence[Refusal], keys: Sequence[str], lens: str
) -> list[Absolute]:
    """Return medians of figures that no two models share a scale for."""
    why = _why_not_absolute(readings, found)

    figures: dict[str, Callable[[Reading, FactReading], float | None]] = {
        "p(answer) of the model": lambda _, fact: fact.final_p,
        "entropy of the model's prediction (bits)": lambda _, fact: fact.final_entropy_bits,
        f"KL to final at half the depth, {lens} lens (bits)": lambda reading, fact: _half_way(
            reading, fact, lens
        ),
    }
    return [
        Absolute(
            name,
            tuple(
                median([of(entry, entry.facts[key]) for key in keys if key in entry.facts])
                for entry in readings
            ),
            why,
        )
        for name, of in figures.items()
    ]


def _half_way(reading: Reading, fact: FactReading, lens: str) -> float | None:
    lensed, row = fact.lenses.get(lens), percentile_row(reading.n_layers, 0.5)
    if lensed is None or row not in lensed.layers:
        return None
    return lensed.kl_bits[lensed.layers.index(row)]


def _why_not_absolute(readings: Sequence[Reading], found: Sequence[Refusal]) -> str | None:
    if not same_model(readings):
        if len({reading.weights for reading in readings}) == 1:
            what = "the weights of these runs were not recorded"
        else:
            what = "these are different models"
        tokenizers = {reading.tokenizer for reading in readings}
        sizes = {reading.d_vocab for reading in readings}
        if len(tokenizers) > 1 or len(sizes) > 1:
            what += " with different tokenizers"
        return f"{what}: probabilities and bits depend on vocabulary and calibration"
    suppressed = [
        readings[entry.run].label
        for entry in found
        if entry.code in ("suppressed", "artefact_high")
    ]
    if suppressed:
        return f"the guidance of {suppressed[0]} asks for ranks instead of probabilities"
    differing = next(
        (entry for entry in found if entry.code in ("norm_choice", "dtype", "format", "prompt")),
        None,
    )
    return differing.reason if differing is not None else None


def _milestone_dict(entry: MilestoneComparison, names: Sequence[str]) -> dict[str, Any]:
    return {
        "facts": list(entry.facts),
        "runs": [
            {"label": name, **asdict(found)} for name, found in zip(names, entry.runs, strict=True)
        ],
        "differences": [
            {"label": name, "from": names[gap.base], **asdict(gap)}
            for name, gap in zip(names, entry.differences, strict=True)
            if gap is not None
        ],
    }


def _fact_dict(found: CrossModel, key: str) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for run, reading in enumerate(found.readings):
        fact = reading.facts.get(key)
        lensed = fact.lenses.get(found.lens) if fact is not None else None
        runs.append(
            {
                "label": reading.label,
                "answer_first_token": first_token(fact) if fact is not None else None,
                "answer_tokens": fact.n_pieces if fact is not None else None,
                "final_rank": fact.final_rank if fact is not None else None,
                "tier": lensed.tier if lensed is not None else None,
                "confirmed_source": lensed.source if lensed is not None else None,
                "milestones": {name: asdict(found.cell(run, key, name)) for name in KINDS},
            }
        )
    return {"fact": key, "runs": runs}
