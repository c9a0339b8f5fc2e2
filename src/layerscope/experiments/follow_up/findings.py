"""A follow-up in words: one verdict, and what to be careful with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.directions import ADD, CONCEPT, PROJECT, RANDOM
from layerscope.experiments.follow_up.languages import OTHER, SOURCE
from layerscope.experiments.follow_up.summary import NEAR

FALSE_ALARMS = 0.05  # of the control's patches that count as causal
BACKUP = 0.1  # an ablation that loses less than this share of what the patch gains
PLENTY_BITS = 1.0
MOSTLY = 0.5


def verdict(onsets: Mapping[str, Any]) -> str:
    """Return one sentence on the onsets of all facts."""
    found = onsets["all"]
    if not found["facts"]:
        return "No fact could be followed up."
    if found["causal"] is None:
        return "No patch at the answer slot gives any of the facts."
    rows = found["difference"]
    where = "at the observed one" if rows == 0 else _side(rows)
    text = (
        f"The causal onset is at row {found['causal']:g} (median of {found['facts']} facts), "
        f"{where}; {found['within_one']:.0%} are within one row of it."
    )
    control = found["control"]
    if control["facts"]:
        text += f" A third subject's values do the same in {control['share']:.0%}."
    return text


def warnings_of(summary: Mapping[str, Any], config: FollowUpConfig) -> list[str]:
    """Return what a reader of the figures must know."""
    return [
        *_onsets(summary["onsets"]["all"], config),
        *_heads(summary["heads"]),
        *_directions(summary["directions"], config),
        *_languages(summary["languages"]),
    ]


def _side(rows: float) -> str:
    unit = "row" if abs(rows) == 1 else "rows"
    return f"{abs(rows):g} {unit} {'before' if rows < 0 else 'after'} the observed one"


def _onsets(found: Mapping[str, Any], config: FollowUpConfig) -> Iterator[str]:
    if not found["facts"]:
        return
    if found["difference"] is not None and found["difference"] < -NEAR:
        yield (
            "patched values decide the answer before a lens can read it: it is in the stream, and "
            "later blocks bring it into the form that is unembedded"
        )
    mlp = found["sites"]["mlp_out"]["share"]
    attention = found["sites"]["attn_out"]["share"]
    if mlp < MOSTLY:
        yield (
            f"a single MLP's output gives rank 1 and {config.min_bits:g} bits in {mlp:.0%} of the "
            f"facts, a single attention's in {attention:.0%}: causal onsets are mostly those of "
            + ("attention" if attention >= MOSTLY else "whole blocks")
        )
    control = found["control"]
    if control["facts"] and control["share"] > FALSE_ALARMS:
        yield (
            f"a third subject's values count as causal in {control['share']:.0%} of the facts: "
            "rank 1 comes too cheaply here for causal onsets to mean much"
        )


def _heads(groups: Mapping[str, Any]) -> Iterator[str]:
    for group, found in groups.items():
        spared = [
            f"{row['block']}.{row['head']}"
            for row in found["top"]
            if row["patch_bits"] >= PLENTY_BITS and row["ablate_bits"] < BACKUP * row["patch_bits"]
        ]
        if spared:
            yield (
                f"{group}: patching {', '.join(spared)} one by one gains a bit or more, ablating "
                "one loses less than a tenth of that: others stand in, so look at the curve of "
                "several together"
            )


def _directions(rows: list[dict[str, Any]], config: FollowUpConfig) -> Iterator[str]:
    own = [row for row in rows if row["operation"] == PROJECT and row["direction"] == CONCEPT]
    for row in own:
        room = -row["log2p_before"]
        if row["set"] == "question" and room < config.min_bits:
            yield (
                f"{row['relation']}: the held-out questions leave {room:.2g} bits to gain, so only "
                "removals and other questions can show what the direction does"
            )
    best = {
        (row["relation"], row["set"], row["alpha"]): row["bits"]
        for row in rows
        if row["operation"] == ADD and row["direction"] == RANDOM
    }
    empty = {(row["relation"], row["set"]) for row in rows if row["as_wanted"] and not row["rank1"]}
    for relation, name in sorted(empty):
        yield (
            f"{relation}, {name}: the direction gains its bits on answers that never come first: "
            "it tilts the odds, and no more"
        )
    for row in rows:
        key = (row["relation"], row["set"], row["alpha"])
        if row["as_wanted"] and best.get(key, 0.0) >= row["bits"] / 2:
            yield (
                f"{row['relation']}, {row['set']}: adding {row['alpha']:g} random directions of "
                "the same length gains at least half as much"
            )


def _languages(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["donor"] == SOURCE and not row["answered"]:
            yield (
                f"{row['language']}: the model does not answer {row['facts']} of the facts in this "
                "language; nothing follows from what their patches do"
            )
    flips = {(row["language"], row["answered"], row["donor"]): row["flip"] for row in rows}
    for (language, answered, donor), share in flips.items():
        if donor == OTHER and answered and share > FALSE_ALARMS:
            yield f"{language}: a third subject's values flip {share:.0%} of the answers as well"
