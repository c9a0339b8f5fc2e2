"""The page of a comparison: depths and ranks side by side, and in grey what says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerscope.measures.cross_model import ONSET, CrossModel, MilestoneComparison
from layerscope.measures.paired_medians import Median
from layerscope.measures.readings import Reading
from layerscope.measures.runs_described import changed, describe
from layerscope.reports.compare_text import depth_text, names_of, refusals_told, verdict
from layerscope.reports.glossary import label, meaning
from layerscope.reports.page import (
    Bars,
    Greyed,
    Lines,
    Multiples,
    Part,
    Section,
    Table,
    Text,
    write_page,
)
from layerscope.reports.text import number, visible

DRAWN_FACTS = 12
OPEN_FACTS = 40  # a longer table of facts is folded
LISTED_REFUSALS = 400
# Divergences are drawn by the smallest of these thresholds (bits) that they are below.
LADDER = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_SEVERITY = {"high": 0, "medium": 1, "low": 2}


def write_compare(found: CrossModel, path: Path) -> Path:
    """Write the page of a comparison; returns the path."""
    sections = [
        *_changed(found),
        _runs(found),
        _milestones(found),
        _facts(found),
        _refused(found),
        _guidance(found),
        *_other_lenses(found),
        _absolute(found),
    ]
    return write_page(
        path,
        title=_title(found),
        kicker=f"{len(found.readings)} runs compared, {visible(found.lens)} lens",
        verdict=verdict(found),
        sections=sections,
        provenance={"runs": [describe(reading) for reading in found.readings]},
    )


def _title(found: CrossModel) -> str:
    models = list(dict.fromkeys(reading.model for reading in found.readings))
    return " against ".join(visible(model, keep_spaces=True) for model in models[:4]) + (
        f" and {len(models) - 4} more" if len(models) > 4 else ""
    )


def _changed(found: CrossModel) -> list[Section]:
    """Show what was done differently, where a model was run more than once."""
    names, parts = names_of(found), list[Part]()
    for change in changed(found.readings):
        model = visible(change.model, keep_spaces=True)
        rows = [[_option(option), *map(_option, values)] for option, values in change.options]
        if rows:
            columns = ("option", *(names[run] for run in change.runs))
            parts.append(Table(columns, rows, caption=f"Options that differ, {model}"))
        else:
            parts.append(Text([f"{model}: nothing that was recorded differs."]))
    lead = "Runs of the same model."
    return [Section("What changed", parts, lead=lead)] if parts else []


def _option(value: Any) -> str:
    if isinstance(value, list | tuple):
        return visible(", ".join(str(entry) for entry in value), keep_spaces=True)
    return "–" if value is None else visible(str(value), keep_spaces=True)


def _runs(found: CrossModel) -> Section:
    told = [describe(reading) for reading in found.readings]
    rows: list[tuple[str, list[Any]]] = [
        ("experiment", [entry["experiment"] for entry in told]),
        ("layers", [entry["n_layers"] for entry in told]),
        ("one row is", [f"{entry['row_depth']:.3f} of the depth" for entry in told]),
        ("vocabulary", [entry["d_vocab"] for entry in told]),
        ("rank within 10 by chance", [f"{entry['chance_of_rank_le_10']:.2%}" for entry in told]),
        ("norm", [entry["norm_choice"] or "not recorded" for entry in told]),
        ("dtype", [entry["dtype"] or "not recorded" for entry in told]),
        ("lenses", [", ".join(entry["lenses"]) for entry in told]),
        ("facts", [entry["facts"] for entry in told]),
        ("weights", [(entry["weights"] or "not recorded")[:12] for entry in told]),
        ("tokenizer", [(entry["tokenizer"] or "not recorded")[:12] for entry in told]),
        ("run", [visible(entry["run"], keep_spaces=True) for entry in told]),
    ]
    lead = (
        "Depth is row / layers, so a difference below one row of the coarser model is none. Ranks "
        "are out of the vocabulary: within ten is easier to reach by chance in a small one."
    )
    table = Table(("", *names_of(found)), [[name, *cells] for name, cells in rows], caption="Runs")
    return Section("Runs", [table], lead=lead)


def _milestones(found: CrossModel) -> Section:
    table = found.by_lens[found.lens]
    parts: list[Part] = [
        _milestone_table(found, table, f"Median depth of each milestone, {found.lens} lens")
    ]
    onset = table.get(ONSET)
    runs = [
        run
        for run, entry in enumerate(onset.runs if onset is not None else ())
        if entry.refused is None and entry.median is not None
    ]
    if onset is not None and runs:
        names = names_of(found)
        parts.append(
            Bars(
                [names[run] for run in runs],
                [onset.runs[run].median for run in runs],
                caption=f"Median onset as a share of the depth, with its 95% interval; "
                f"{len(onset.facts)} facts",
                errors=[_ends(onset.runs[run]) for run in runs],
            )
        )
    gaps = _differences(found, table)
    if gaps is not None:
        parts.append(gaps)
    if found.groups:
        parts.append(
            _milestone_table(found, found.groups, "Median onset by relation and language", "facts")
        )
    lead = (
        "Over the facts that all compared runs may be compared on. In brackets the 95% bootstrap "
        "interval of the median; (3/5): three of five facts reach it. Grey cells are not "
        "compared: point at them, or see below, for the reason."
    )
    return Section("Where milestones lie", parts, lead=lead)


def _milestone_table(
    found: CrossModel,
    table: Mapping[str, MilestoneComparison],
    caption: str,
    first: str = "milestone",
) -> Table:
    rows: list[list[Any]] = []
    for name, entry in table.items():
        title = f"{label(name)}: {meaning(name)}" if meaning(name) else name
        cells = [
            Greyed(depth_text(one), one.refused) if one.refused else depth_text(one)
            for one in entry.runs
        ]
        rows.append([visible(title, keep_spaces=True), *cells, len(entry.facts)])
    return Table((first, *names_of(found), "facts compared"), rows, caption=caption)


def _differences(found: CrossModel, table: Mapping[str, MilestoneComparison]) -> Table | None:
    names = names_of(found)
    rows = [
        [
            label(milestone),
            names[run],
            names[gap.base],
            _signed(gap.median),
            f"{_signed(gap.low)} to {_signed(gap.high)}",
            gap.n,
            round(gap.row, 3),
            "yes" if gap.resolved else "no",
        ]
        for milestone, entry in table.items()
        for run, gap in enumerate(entry.differences)
        if gap is not None and gap.median is not None
    ]
    columns = (
        "milestone",
        "run",
        "minus",
        "median",
        "95% interval",
        "facts",
        "one row",
        "told apart",
    )
    caption = "Differences of depth, fact by fact; told apart: by a row or more, and zero excluded"
    return Table(columns, rows, caption=caption) if rows else None


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _ends(entry: Median) -> tuple[float, float] | None:
    return None if entry.low is None or entry.high is None else (entry.low, entry.high)


def _facts(found: CrossModel) -> Section:
    names, many = names_of(found), len(found.facts) > OPEN_FACTS
    onsets = [
        [visible(key, keep_spaces=True), *(_onset(found, run, key) for run in range(len(names)))]
        for key in found.facts
    ]
    beside = [
        [visible(key, keep_spaces=True)]
        + [_beside(reading, key, found.lens) for reading in found.readings]
        for key in found.facts
    ]
    parts: list[Part] = [
        Table(("fact", *names), onsets, caption="Onset (share of the depth)", folded=many),
        Table(
            ("fact", *names),
            beside,
            caption="Confirmed by; artefact tier; rank of the answer in the model's own prediction",
            folded=many,
        ),
    ]
    # Facts that several runs may be compared on come first.
    order = sorted(found.facts, key=lambda key: -_compared(found, key))[:DRAWN_FACTS]
    drawn = [drawing for key in order for drawing in _curves(found, key)]
    if drawn:
        parts.append(Multiples(drawn))
    rest = len(found.facts) - DRAWN_FACTS
    if rest > 0:
        parts.append(Text([f"{rest} more facts are in the tables above and are not drawn."]))
    lead = (
        "Left: rank of the answer, 1 is first. Right: the smallest threshold that the divergence "
        "from the run's own final prediction is below. Runs that may not be compared on a fact "
        "are not drawn, and lines that coincide cover each other."
    )
    return Section("Fact by fact", parts, lead=lead)


def _compared(found: CrossModel, key: str) -> int:
    return sum(found.cell(run, key, ONSET).refused is None for run in range(len(found.readings)))


def _onset(found: CrossModel, run: int, key: str) -> Any:
    cell = found.cell(run, key, ONSET)
    if key not in found.readings[run].facts:
        return Greyed(None, cell.refused or "not asked")
    text = "never" if cell.depth is None else f"{cell.depth:.2f} (row {cell.row})"
    return Greyed(text, cell.refused) if cell.refused else text


def _beside(reading: Reading, key: str, lens: str) -> str:
    fact = reading.facts.get(key)
    if fact is None:
        return "–"
    lensed = fact.lenses.get(lens)
    source = (lensed.source if lensed else None) or "not tested"
    tier = (lensed.tier if lensed else None) or "unknown"
    return f"{source}; {tier}; {number(fact.final_rank)}"


def _curves(found: CrossModel, key: str) -> list[Lines]:
    """Return the rank and the threshold of divergence over depth, all comparable runs at once."""
    title = visible(key, keep_spaces=True)
    ranks: dict[str, list[tuple[float, float | None]]] = {}
    bits: dict[str, list[tuple[float, float | None]]] = {}
    for run, (name, reading) in enumerate(zip(names_of(found), found.readings, strict=True)):
        lensed = reading.facts[key].lenses.get(found.lens) if key in reading.facts else None
        depths = [layer / reading.n_layers for layer in lensed.layers] if lensed else []
        # A run that is not drawn keeps its place in the legend, so that colours stay the same.
        if lensed is not None and found.cell(run, key, ONSET).refused is None:
            ranks[name] = list(zip(depths, lensed.ranks, strict=True))
        else:
            ranks[f"{name}: not compared"] = []
        if lensed is not None and found.cell(run, key, "first_kl_below_1.0").refused is None:
            bits[name] = _steps(depths, [_threshold(value) for value in lensed.kl_bits])
        else:
            bits[f"{name}: not compared"] = []
    drawings: list[Lines] = []
    if any(ranks.values()):
        drawings.append(Lines(ranks, "depth", "answer rank", f"{title}: rank", log_y=True))
    if any(bits.values()):
        drawings.append(
            Lines(bits, "depth", "bits, at most", f"{title}: divergence threshold", log_y=True)
        )
    return drawings


def _threshold(bits: float | None) -> float | None:
    if bits is None:
        return None
    return next((step for step in LADDER if bits <= step), 2 * LADDER[-1])


def _steps(xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float | None]]:
    points: list[tuple[float, float | None]] = []
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if at and ys[at - 1] != y:
            points.append((x, ys[at - 1]))
        points.append((x, y))
    return points


def _refused(found: CrossModel) -> Section:
    rows = refusals_told(found)
    table = Table(
        ("run", "what", "why", "what to do"), rows[:LISTED_REFUSALS], caption="Not compared"
    )
    parts: list[Part] = [table] if rows else [Text(["Nothing is refused."])]
    if len(rows) > LISTED_REFUSALS:
        parts.append(Text([f"{len(rows) - LISTED_REFUSALS} more are in the output of --json."]))
    lead = "The value that most runs share is taken as the common one; the others are left out."
    return Section("What may not be compared", parts, lead=lead)


def _guidance(found: CrossModel) -> Section:
    """Show reasons for doubt side by side, the most severe first."""
    severities: dict[str, dict[int, str]] = {}
    for run, reading in enumerate(found.readings):
        for entry in reading.guidance.get("reasons") or ():
            severities.setdefault(str(entry.get("code")), {})[run] = str(entry.get("severity"))
    order = sorted(
        severities,
        key=lambda code: (
            min(_SEVERITY.get(level, 3) for level in severities[code].values()),
            -len(severities[code]),
        ),
    )
    rows = [
        [visible(code), *(severities[code].get(run, "–") for run in range(len(found.readings)))]
        for code in order
    ]
    told = [describe(reading) for reading in found.readings]
    summary = [
        ["trust", *(entry["trust"] or "not judged" for entry in told)],
        ["ranks instead of probabilities", *(_yes(entry["prefer_ranks"]) for entry in told)],
        ["lens to report", *(_option(entry["preferred_lens_for_reporting"]) for entry in told)],
        ["artefact tiers", *(_counted(entry["tiers"]) for entry in told)],
        ["onsets confirmed by", *(_counted(entry["confirmed_sources"]) for entry in told)],
    ]
    names = names_of(found)
    parts: list[Part] = [Table(("guidance", *names), summary, caption="How far to believe each")]
    if rows:
        parts.append(Table(("reason", *names), rows, caption="Reasons for doubt, by severity"))
    return Section("How far to believe each run", parts)


def _yes(value: bool | None) -> str:
    return "not judged" if value is None else "yes" if value else "no"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "–"


def _other_lenses(found: CrossModel) -> list[Section]:
    tables: list[Part] = [
        _milestone_table(found, found.by_lens[lens], f"Median depth, {lens} lens")
        for lens in found.lenses
        if lens != found.lens
    ]
    return [Section("Through the other lenses", tables)] if tables else []


def _absolute(found: CrossModel) -> Section:
    rows = [
        [entry.name]
        + [Greyed(value, entry.refused) if entry.refused else value for value in entry.values]
        for entry in found.absolute
    ]
    why = next((entry.refused for entry in found.absolute if entry.refused), None)
    table = Table(("median over facts", *names_of(found)), rows, caption="Within one model only")
    lead = (
        f"Grey, because {why}." if why else "All runs are of one model, so these may be compared."
    )
    return Section("Probabilities and bits", [table], lead=lead)
