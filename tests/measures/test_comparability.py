"""Every reason not to compare two runs, by a case that has it; runs that agree are not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from layerscope.measures.comparability import Refusal, common, refusals
from layerscope.measures.readings import ALL_KINDS, Reading
from support.readings import reading, with_fact, with_lenses

LENSES = ("norm", "raw", "tuned")


def runs() -> list[Reading]:
    return [reading(name, [1, 2], lenses=LENSES) for name in ("first", "second", "third")]


def test_runs_that_agree_are_not_refused() -> None:
    assert refusals(runs(), lenses=LENSES) == []


def without_tuned(run: Reading) -> Reading:
    facts = {
        key: replace(fact, lenses={name: fact.lenses[name] for name in ("norm", "raw")})
        for key, fact in run.facts.items()
    }
    refused = {"status": "missing", "reason": "no lens was ever fitted"}
    return replace(run, facts=facts, lenses={**run.lenses, "tuned": refused})


OTHER_TEXT = {"corpus": {"text_sha256": "b" * 64}, "norm": "final"}
SUPPRESSED = {
    "suppress_abs_probs": True,
    "reasons": [{"code": "near_overflow"}, {"code": "prompt_echo"}],
}
# code -> (what is done to the third run, lens, fact, kinds, words of the reason)
Case = tuple[Callable[[Reading], Reading], str | None, str | None, tuple[str, ...], str]
CASES: dict[str, Case] = {
    "lens_missing": (without_tuned, "tuned", None, ALL_KINDS, "no lens was ever fitted"),
    "norm_choice": (
        lambda run: replace(run, norm_choice="next_norm"),
        "norm",
        None,
        ALL_KINDS,
        "next_norm norm, the others with the final norm",
    ),
    "lens_text": (
        lambda run: replace(run, lenses={**run.lenses, "tuned": OTHER_TEXT}),
        "tuned",
        None,
        ALL_KINDS,
        "fitted on other text (bbbbbbbb) than the others (aaaaaaaa)",
    ),
    "thresholds": (
        lambda run: replace(run, thresholds={"semantic_gap": 2.0, "confirm_window": 2}),
        None,
        None,
        ("probability",),
        "semantic_gap 2.0, the others with 0.5",
    ),
    "dtype": (
        lambda run: replace(run, dtype="bfloat16"),
        None,
        None,
        ("kl", "probability"),
        "computed in bfloat16, the others in float32",
    ),
    "suppressed": (
        lambda run: replace(run, guidance=SUPPRESSED),
        None,
        None,
        ("probability",),
        "(near_overflow)",
    ),
    "artefact_high": (
        lambda run: with_fact(
            run,
            "B",
            lenses={
                **run.facts["B"].lenses,
                "norm": replace(run.facts["B"].lenses["norm"], tier="high"),
            },
        ),
        None,
        "B",
        ("probability",),
        "artefact tier high",
    ),
    "confirmed_by_others": (
        lambda run: with_lenses(run, "norm", confirming=("raw", "tuned")),
        "norm",
        None,
        ("confirmed",),
        "raw and tuned, those of the others by raw",
    ),
    "not_asked": (
        lambda run: replace(run, facts={"A": run.facts["A"]}),
        None,
        "B",
        ALL_KINDS,
        "not asked",
    ),
    "not_aligned": (
        lambda run: with_fact(run, "B", alignment="unaligned", first_piece=None),
        None,
        "B",
        ALL_KINDS,
        "unaligned",
    ),
    "answer_blank": (
        lambda run: with_fact(run, "B", first_piece="▁", n_pieces=4),
        None,
        "B",
        ALL_KINDS,
        "only white space (4 tokens)",
    ),
    "prompt": (
        lambda run: with_fact(run, "B", text="What is the capital?"),
        None,
        "B",
        ALL_KINDS,
        "other words",
    ),
    "format": (
        lambda run: with_fact(run, "B", form="chat"),
        None,
        "B",
        ALL_KINDS,
        "asked as chat, the others as raw",
    ),
    "tokenisation": (
        lambda run: with_fact(run, "B", first_piece="▁Ber", n_pieces=2),
        None,
        "B",
        ALL_KINDS,
        "the token “Ber” (2 tokens), in the others with “B”",
    ),
}


@pytest.mark.parametrize("code", CASES)
def test_one_difference_is_refused_and_nothing_else(code: str) -> None:
    change, lens, fact, kinds, words = CASES[code]
    first, second, third = runs()
    found = refusals([first, second, change(third)], lenses=LENSES)
    places = [(entry.run, entry.code, entry.lens, entry.fact) for entry in found]
    assert (2, code, lens, fact) in places
    assert {entry.run for entry in found} == {2}
    assert {entry.code for entry in found} == {code}
    entry = next(entry for entry in found if entry.lens == lens)
    assert entry.kinds == kinds
    assert words in entry.reason
    assert entry.action.endswith(".")


def test_a_check_of_precision_allows_another_dtype() -> None:
    first, second, third = runs()
    checked = replace(third, dtype="bfloat16", precision_holds=True)
    assert refusals([first, second, checked], lenses=LENSES) == []
    failed = replace(checked, precision_holds=False)
    assert [entry.code for entry in refusals([first, second, failed], lenses=LENSES)] == ["dtype"]


def test_an_unrecorded_text_is_no_common_text() -> None:
    found = refusals(
        [replace(run, lenses={"tuned": {"norm": "final"}}) for run in runs()],
        lenses=LENSES,
    )
    assert [(entry.run, entry.code) for entry in found] == [(at, "lens_text") for at in range(3)]
    assert "not recorded" in found[0].reason


def test_a_space_mark_is_no_other_token() -> None:
    first, second, third = runs()
    for piece in ("▁B", "ĠB", "B"):
        assert not refusals(
            [first, second, with_fact(third, "B", first_piece=piece)], lenses=LENSES
        )


def test_a_fact_that_no_run_can_use_does_not_decide_what_is_common() -> None:
    first, second, third = runs()
    blank = [with_fact(run, "B", first_piece=" ", text="other") for run in (first, second)]
    found = refusals([*blank, third], lenses=LENSES)
    assert [(entry.run, entry.code) for entry in found] == [
        (0, "answer_blank"),
        (1, "answer_blank"),
    ]


def test_the_common_value_is_the_most_frequent_then_the_earliest() -> None:
    assert common(["b", "a", "a"]) == "a"
    assert common(["b", "a"]) == "b"


def test_a_refusal_covers_its_lens_fact_and_kinds() -> None:
    entry = Refusal(run=0, code="x", reason="r", action="a", lens="norm", fact="A", kinds=("kl",))
    assert entry.covers("norm", "A", "first_kl_below_1.0")
    assert not entry.covers("raw", "A", "first_kl_below_1.0")
    assert not entry.covers("norm", "B", "first_kl_below_1.0")
    assert not entry.covers("norm", "A", "L_semantic")
