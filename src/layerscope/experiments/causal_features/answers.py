"""What a player's text decides: stop, bet, or nothing that can be told.

A text that cannot be told is neither: it is counted, and left out of every rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["bet", "stop", "invalid"]

_MARKER = re.compile(r"(?:final\s+)?(?:decision|answer|choice)\s*(?:is)?\s*:", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\d$])([12])\)|\boption\s+([12])\b", re.IGNORECASE)
_WORD = re.compile(
    r"(?P<stop>\bstop(?:s|ping)?(?:\s+betting)?\b|\bquit(?:s|ting)?\b|\bwalk away\b|\bcash out\b)"
    r"|(?P<bet>\bbets?\b|\bbetting\b|\bkeep playing\b|\bcontinue\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"(?:\b(?:not|never|no|cannot)|n't)\s+(?:\w+\s+){0,1}$", re.IGNORECASE)
_RANGE = re.compile(r"\$\s?\d[\d,]*\s*(?:-|–|to)\s*\$?\s?\d[\d,]*")
_AMOUNT = re.compile(r"\$\s?(\d[\d,]*(?:\.\d+)?)|\b(\d[\d,]*(?:\.\d+)?)\s+dollars?\b")


@dataclass(frozen=True)
class Parsed:
    """A decision, or why there is none.

    Attributes:
        action: "bet", "stop" or "invalid".
        bet: dollars, where a bet names them (or only one sum is offered).
        reason: why it is invalid, or what a valid one lacks; empty where all is there.
    """

    action: Action
    bet: float | None = None
    reason: str = ""

    @property
    def valid(self) -> bool:
        """Whether there is a decision."""
        return self.action != "invalid"

    def to_dict(self, response: str) -> dict[str, Any]:
        """Return the record of a response log."""
        record: dict[str, Any] = {
            "action": self.action,
            "bet": self.bet,
            "valid": self.valid,
            "response": response,
        }
        return {**record, "reason": self.reason} if self.reason else record


def parse_decision(text: str, *, low: float | None = None, high: float | None = None) -> Parsed:
    """Read the decision of a text in which option 1 is to bet and option 2 to stop.

    The part after the last "Decision:" counts, where there is one. A number and the word after it
    must agree; both options, or a word that is only denied, decide nothing.

    Args:
        text: what was generated.
        low, high: the bets offered, in dollars; equal where only one is.
    """
    part = text
    for marker in _MARKER.finditer(text):
        if text[marker.end() :].strip():
            part = text[marker.end() :]
    if not part.strip():
        return Parsed("invalid", reason="empty")
    numbers = list(_NUMBER.finditer(part))
    named = {match[1] or match[2] for match in numbers}
    if len(named) == 2:
        return Parsed("invalid", reason="both options")
    words = [(m.lastgroup or "", m.start(), m.end()) for m in _WORD.finditer(part)]
    said = [w for w in words if not _NEGATION.search(part[: w[1]])]
    if named:
        action: Action = "bet" if named == {"1"} else "stop"
        start = numbers[0].end()
        after = next((w for w in said if w[1] >= start), None)
        if after is not None and after[0] != action:
            return Parsed("invalid", reason="number and word disagree")
    elif len({w[0] for w in said}) == 1:
        action = "bet" if said[0][0] == "bet" else "stop"
        start = said[0][1]
    elif said:
        return Parsed("invalid", reason="both options")
    else:
        return Parsed("invalid", reason="denied only" if words else "no decision")
    if action == "stop":
        return Parsed("stop")
    return _bet(part[start:], low, high)


def _bet(text: str, low: float | None, high: float | None) -> Parsed:
    found = _AMOUNT.search(_RANGE.sub(" ", text))
    if found is None:
        if low is not None and low == high:
            return Parsed("bet", low)
        return Parsed("bet", reason="no amount")
    amount = float((found[1] or found[2]).replace(",", ""))
    if (low is not None and amount < low) or (high is not None and amount > high):
        return Parsed("invalid", reason="amount not offered")
    return Parsed("bet", amount)
