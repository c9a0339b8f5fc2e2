"""The control of a patch: the same cell with values of another pair, which says nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerscope.interventions.patching import Direction, TokenPair

NO_CONTROL = (
    "no control: it takes the values of another pair of as many tokens and with another answer, "
    "and there is none; give more pairs"
)
UNSPECIFIC = 0.75
"""Share of an effect that the control's must not reach. About half is to be expected where both
prompts of a pair have an answer: the other pair's values take the patched run's own answer away."""


def strangers(pairs: Sequence[TokenPair], direction: Direction) -> dict[str, TokenPair]:
    """Return for each pair, by key, the next one whose values can stand in for its own.

    Its prompts have as many tokens and the same places, and what its donor prompt is answered is
    neither an answer nor a foil of the pair. Pairs without such a one are missing.
    """
    found: dict[str, TokenPair] = {}
    for at, pair in enumerate(pairs):
        others = (*pairs[at + 1 :], *pairs[:at])
        other = next((other for other in others if _fits(pair, other, direction)), None)
        if other is not None:
            found[pair.pair.key] = other
    return found


def with_donor(pair: TokenPair, other: TokenPair, direction: Direction) -> TokenPair:
    """Return a pair whose donor is another pair's: what is asked of it stays as it was."""
    if direction == "denoise":
        changed = replace(pair, clean=other.clean, tokens=other.tokens)
    else:
        changed = replace(pair, corrupt=other.corrupt)
    same = 0
    for left, right in zip(changed.clean, changed.corrupt, strict=True):
        if left != right:
            break
        same += 1
    return replace(changed, same=same)


def _fits(pair: TokenPair, other: TokenPair, direction: Direction) -> bool:
    if not (pair.aligned and other.aligned and len(pair.clean) == len(other.clean)):
        return False
    if _columns(pair) != _columns(other):
        return False
    own = {*pair.targets.answers, *pair.targets.foils}
    said = other.targets.answers if direction == "denoise" else other.targets.foils
    return own.isdisjoint(said)


def _columns(pair: TokenPair) -> list[tuple[str, int, int]]:
    return [(place.label, place.clean, place.corrupt) for place in pair.places]


def doubts(rows: Sequence[tuple[str, float | None, float | None]]) -> list[str]:
    """Return a caution about what the control moves as well.

    Args:
        rows: name, effect and the control's effect of each of the strongest.
    """
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return []
    if all(control is None for _, _, control in rows):
        return [NO_CONTROL]
    loud = [
        name
        for name, effect, control in rows
        if effect and control is not None and control / effect >= UNSPECIFIC
    ]
    if not loud:
        return []
    return [
        f"another pair's values do at least {UNSPECIFIC:.0%} as much in {len(loud)} of the "
        f"{len(rows)} strongest ({', '.join(loud[:3])}): what counts there is that the run's own "
        "values are gone, not what comes in their place"
    ]
