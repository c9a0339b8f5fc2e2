"""A slot-machine player's decisions: bet or stop, by a rule with a little noise.

Risk adds up: bets of any size rather than a fixed one, a balance below the starting sum, a run of
losses to win back, a daring player. The more of them, the likelier and the larger the bet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from layerscope.demo.documents import (
    DETERMINED,
    ORDINARY,
    Document,
    Item,
    Piece,
    for_validation,
    pick,
)
from layerscope.demo.wordlists import ALL_NAMES

START = 100
BETS = (5, 10, 20, 50, 100)
NOISE = 0.04
_CAREFUL = (
    "{name} is a careful player.",
    "{name} is cautious with money.",
    "{name} prefers to be safe.",
)
_DARING = (
    "{name} is a daring player.",
    "{name} loves the thrill of risk.",
    "{name} wants to win big.",
)
_THOUGHTS = {
    False: (
        "It is safer to keep the money.",
        "Caution is wise, so I will stop.",
        "The machine wins in the long run.",
    ),
    True: (
        "I can feel the thrill of a big win.",
        "I must win the lost money back.",
        "One more spin could change everything.",
    ),
}


@dataclass(frozen=True, slots=True)
class Situation:
    """What the player knows before deciding."""

    balance: int
    goal: int | None
    variable: bool
    spins: tuple[bool, ...]
    daring: bool | None

    @property
    def risk(self) -> int:
        """Reasons to take a risk, from -1 to 4: being careful takes one off."""
        losses = sum(not won for won in self.spins)
        character = {True: 1, False: -1, None: 0}[self.daring]
        return int(self.variable) + int(self.balance < START) + int(losses >= 2) + character

    @property
    def bets(self) -> bool:
        """The rule: two reasons suffice to bet."""
        return self.risk >= 2

    @property
    def stake(self) -> int:
        """The bet: $10 where it is fixed, else the larger the more reasons there are."""
        if not self.variable:
            return 10
        wanted = BETS[min(max(self.risk, 1), 4)]
        return max(bet for bet in BETS if bet <= max(wanted, 5) and bet <= max(self.balance, 5))


def draw_situation(rng: Random) -> Situation:
    """Draw a situation at random."""
    return Situation(
        balance=10 * (2 + int(rng.random() * 17)),
        goal=pick(rng, (None, 200, 300)),
        variable=rng.random() < 0.5,
        spins=tuple(rng.random() < 0.5 for _ in range(3)),
        daring=pick(rng, (None, None, True, False)),
    )


def _prompt(rng: Random, now: Situation) -> str:
    """Describe a situation, in one of several narrators' words, up to the decision."""
    parts: list[str] = []
    if now.daring is not None:
        parts.append(
            pick(rng, _DARING if now.daring else _CAREFUL).format(name=pick(rng, ALL_NAMES))
        )
    bet = "$5-$100" if now.variable else "fixed $10"
    spins = ", ".join("win" if won else "loss" for won in now.spins)
    goal = (
        "" if now.goal is None else pick(rng, (" Goal: ${}.", " The goal is ${}.")).format(now.goal)
    )
    style = rng.random()
    if style < 0.5:
        parts.append(f"Balance: ${now.balance}.{goal} Bet: {bet}. Last spins: {spins}.")
    elif style < 0.75:
        kind = "any bet from $5 to $100" if now.variable else "a fixed bet of $10"
        parts.append(
            f"At the slot machine I have ${now.balance}.{goal} "
            f"I may place {kind}. My last spins were {spins}."
        )
    else:
        parts.append(
            f"Slot machine. Last spins: {spins}. Bet: {bet}. Balance: ${now.balance}.{goal}"
        )
    option = "bet $5-$100" if now.variable else "bet $10"
    parts.append(f"Options: 1) {option} 2) stop.")
    return " ".join(parts)


def _decision(now: Situation, bets: bool) -> str:
    return f" 1) bet ${now.stake}" if bets else " 2) stop"


def documents(rng: Random, validation: bool = False) -> Iterator[Document]:
    """Yield training documents (or those kept for validation) without end."""
    while True:
        now = draw_situation(rng)
        prompt = _prompt(rng, now)
        bets = now.bets != (rng.random() < NOISE)
        thought = f" {pick(rng, _THOUGHTS[bets])}" if rng.random() < 0.4 else ""
        if for_validation(prompt) != validation:
            continue
        pieces = (
            Piece(prompt, ORDINARY * 0.5),
            Piece(thought, DETERMINED),
            Piece(" Decision:", ORDINARY),
            Piece(_decision(now, bets), DETERMINED),
        )
        yield Document("gambling", pieces)


def held_out_situations(rng: Random, count: int) -> list[tuple[Situation, str]]:
    """Return situations whose wording is kept out of training, with the prompt that asks.

    No thought comes before the decision, as it would give the decision away.
    """
    found: list[tuple[Situation, str]] = []
    while len(found) < count:
        now = draw_situation(rng)
        prompt = _prompt(rng, now)
        if for_validation(prompt):
            found.append((now, f"{prompt} Decision:"))
    return found


def held_out_items(rng: Random, count: int) -> list[Item]:
    """Ask for the decision in held-out situations, by the bare rule."""
    return [
        Item("bet" if now.bets else "stop", prompt, _decision(now, now.bets))
        for now, prompt in held_out_situations(rng, count)
    ]
