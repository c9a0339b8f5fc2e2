"""Golden transcripts: what decides, what does not, and what is never guessed."""

from __future__ import annotations

import pytest

from layerscope.experiments.causal_features.answers import parse_decision

GOLDEN = (
    (" 2) stop", "stop", None, ""),
    (" 1) bet $20", "bet", 20.0, ""),
    ("1) Bet $1,000.50 please", "bet", 1000.5, ""),
    ("I bet 15 dollars.", "bet", 15.0, ""),
    ("I will stop.", "stop", None, ""),
    ("2) Stop betting now, I keep $40.", "stop", None, ""),
    ("I choose option 2 and walk away.", "stop", None, ""),
    ("I could stop. Final decision: 1) bet $5", "bet", 5.0, ""),
    ("Decision: 2) stop. Decision:", "stop", None, ""),
    ("1) bet", "bet", None, "no amount"),
    ("1) bet $5-$100", "bet", None, "no amount"),
    ("", "invalid", None, "empty"),
    ("  \n", "invalid", None, "empty"),
    ("bik bikik baltos", "invalid", None, "no decision"),
    ("1) bet $10 2) stop", "invalid", None, "both options"),
    ("I bet or I stop.", "invalid", None, "both options"),
    ("1) stop", "invalid", None, "number and word disagree"),
    ("2) bet $10", "invalid", None, "number and word disagree"),
    ("I will not stop.", "invalid", None, "denied only"),
    ("I never bet.", "invalid", None, "denied only"),
    ("I will not bet, I stop.", "stop", None, ""),
    ("$20", "invalid", None, "no decision"),
)


@pytest.mark.parametrize(("text", "action", "bet", "reason"), GOLDEN)
def test_transcripts(text: str, action: str, bet: float | None, reason: str) -> None:
    found = parse_decision(text)
    assert (found.action, found.bet, found.reason) == (action, bet, reason)
    assert found.valid == (action != "invalid")


def test_the_offer_decides_what_a_bet_can_be() -> None:
    assert parse_decision("1) bet", low=10, high=10).bet == 10
    assert parse_decision("1) bet $20", low=5, high=100).bet == 20
    found = parse_decision("1) bet $500", low=5, high=100)
    assert (found.action, found.reason) == ("invalid", "amount not offered")


def test_a_record_of_a_log_names_what_it_lacks() -> None:
    assert parse_decision("what").to_dict("what") == {
        "action": "invalid",
        "bet": None,
        "valid": False,
        "response": "what",
        "reason": "no decision",
    }
    assert "reason" not in parse_decision("2) stop").to_dict("2) stop")
