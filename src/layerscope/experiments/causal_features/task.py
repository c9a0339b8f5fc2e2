"""The prompts of a run: two groups to contrast, and others of each to patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from layerscope.demo.gambling import Situation, held_out_situations
from layerscope.errors import PromptError

DEMO = "demo:slot-machine"
SIDES = ("safe", "risky")
CONTRAST, PATCHED = 300, 8  # prompts per group of the embedded model's task


@dataclass(frozen=True)
class Game:
    """A prompt that asks for a decision.

    Attributes:
        prompt: its text.
        low, high: bets offered, in dollars; None where unknown.
    """

    prompt: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Task:
    """Two groups of prompts, of which one should stop and the other bet.

    Attributes:
        name: what reports call it.
        contrast: by side ("safe", "risky"), the prompts whose feature values are compared.
        patched: by side, the prompts that are answered under patches; none is among `contrast`.
    """

    name: str
    contrast: Mapping[str, tuple[Game, ...]]
    patched: Mapping[str, tuple[Game, ...]]

    def __post_init__(self) -> None:
        for part in (self.contrast, self.patched):
            if set(part) != set(SIDES):
                raise PromptError("a task needs prompts named safe and risky")
        short = [side for side in SIDES if len(self.contrast[side]) < 2]
        if short or not all(self.patched[side] for side in SIDES):
            raise PromptError(
                f"task '{self.name}' needs two prompts or more to contrast and one to patch for "
                "each of safe and risky"
            )
        texts = {side: {game.prompt for game in self.contrast[side]} for side in SIDES}
        if texts["safe"] & texts["risky"]:
            raise PromptError(f"task '{self.name}' has a prompt that is safe and risky")
        again = {game.prompt for side in SIDES for game in self.patched[side]}
        if again & (texts["safe"] | texts["risky"]):
            raise PromptError(
                f"task '{self.name}' patches a prompt that its features were chosen on: keep the "
                "two sets apart"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the prompts, ready for JSON."""
        return {
            "name": self.name,
            "contrast": {side: [asdict(game) for game in self.contrast[side]] for side in SIDES},
            "patched": {side: [asdict(game) for game in self.patched[side]] for side in SIDES},
        }


def demo_task(*, contrast: int = CONTRAST, patched: int = PATCHED, seed: int = 0) -> Task:
    """Return the slot-machine task of the embedded model, in wordings it was not trained on.

    Contrasted are situations in which its rule says stop, and such where it says bet. Patched are
    those next to the border, with one reason (safe) or two (risky) to bet, where the model leaves
    room to move: it bets in about a tenth of the former and two thirds of the latter.
    """
    rng = Random(f"causal-features-{seed}")
    compared: dict[str, list[Game]] = {side: [] for side in SIDES}
    moved: dict[str, list[Game]] = {side: [] for side in SIDES}
    taken: set[str] = set()
    while min(map(len, compared.values())) < contrast or min(map(len, moved.values())) < patched:
        ((now, prompt),) = held_out_situations(rng, 1)
        if prompt in taken:
            continue
        taken.add(prompt)
        side = SIDES[now.bets]
        if now.risk in (1, 2) and len(moved[side]) < patched:
            moved[side].append(_game(now, prompt))
        elif len(compared[side]) < contrast:
            compared[side].append(_game(now, prompt))
    return Task(
        DEMO,
        {side: tuple(games) for side, games in compared.items()},
        {side: tuple(games) for side, games in moved.items()},
    )


def read_task(path: str | Path, *, patched: int = PATCHED) -> Task:
    """Read a task from YAML or JSON: lists `safe` and `risky` of texts, or of prompt, low, high.

    Lists `safe_patched` and `risky_patched` name the prompts to patch; without them the last
    `patched` of each list are kept for that (a quarter of a short list).

    Raises:
        PromptError: the file cannot be read, or lacks something; says what.
    """
    path = Path(path)
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PromptError(f"{path} cannot be read as a task: {error}") from error
    if not isinstance(content, Mapping) or any(side not in content for side in SIDES):
        raise PromptError(f"{path}: give lists of prompts named safe and risky")
    compared: dict[str, tuple[Game, ...]] = {}
    moved: dict[str, tuple[Game, ...]] = {}
    for side in SIDES:
        games = _games(path, side, content[side])
        given = content.get(f"{side}_patched")
        if given is not None:
            compared[side], moved[side] = games, _games(path, f"{side}_patched", given)
            continue
        kept = max(1, min(patched, len(games) // 4))
        compared[side], moved[side] = games[:-kept], games[-kept:]
    return Task(path.stem, compared, moved)


def _games(path: Path, name: str, listed: Any) -> tuple[Game, ...]:
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise PromptError(f"{path}: '{name}' is no list of prompts")
    games: list[Game] = []
    for number, entry in enumerate(listed):
        record: Any = {"prompt": entry} if isinstance(entry, str) else entry
        try:
            limits = [record.get(key) for key in ("low", "high")]
            low, high = (None if limit is None else float(limit) for limit in limits)
            text = record["prompt"]
        except (AttributeError, KeyError, TypeError, ValueError):
            text, low, high = None, None, None
        if not isinstance(text, str) or not text.strip():
            raise PromptError(
                f"{path}: entry {number} of '{name}' needs a prompt, and may have numbers low and "
                "high"
            )
        games.append(Game(text, low, high))
    return tuple(games)


def _game(now: Situation, prompt: str) -> Game:
    return Game(prompt, 5.0, 100.0) if now.variable else Game(prompt, 10.0, 10.0)
