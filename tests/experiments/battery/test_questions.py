"""Every item becomes its questions; permuted answers are a derangement, whatever the order."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from layerscope.experiments.battery import PARTS, Battery, Item
from layerscope.experiments.battery.items import shared_answers
from layerscope.experiments.battery.questions import permuted_answers, questions
from layerscope.experiments.battery.wordings import Wordings


def items_of(answers: list[str]) -> list[Item]:
    return [
        Item(relation="capital", subject=f"s{number}", answer=answer)
        for number, answer in enumerate(answers)
    ]


@given(
    answers=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=130),
    seed=st.integers(0, 5),
)
def test_no_item_gets_its_own_answer_and_answers_are_used_once(
    answers: list[str], seed: int
) -> None:
    items = items_of(answers)
    found = permuted_answers(items, seed=seed)
    own = {item.key: item.answer for item in items}
    assert all(found[key] != own[key] for key in found)
    assert not Counter(found.values()) - Counter(answers)


@given(count=st.integers(2, 130))
def test_distinct_answers_are_all_permuted_within_batches_of_fifty(count: int) -> None:
    items = items_of([f"a{number}" for number in range(count)])
    found = permuted_answers(items, seed=3)
    assert sorted(found.values()) == sorted(item.answer for item in items)
    owner = {item.answer: item.key for item in items}
    step = {key: owner[answer] for key, answer in found.items()}
    cycles: list[int] = []
    left = set(step)
    while left:
        at, size = left.pop(), 1
        while step[at] in left:
            at, size = step[at], size + 1
            left.discard(at)
        cycles.append(size)
    assert max(cycles) <= 51  # the last of a batch of one joins the batch before


def test_where_most_answers_are_one_those_are_left_out() -> None:
    found = permuted_answers(items_of(["euro"] * 4 + ["yen"]), seed=0)
    assert len(found) == 2  # the yen, and the one euro that gets it
    assert sorted(found.values()) == ["euro", "yen"]


def test_permutation_depends_on_the_seed_and_not_on_the_order() -> None:
    items = items_of([f"a{number}" for number in range(60)])
    shuffled = items.copy()
    random.Random(0).shuffle(shuffled)
    assert permuted_answers(shuffled, seed=1) == permuted_answers(items, seed=1)
    assert permuted_answers(items, seed=2) != permuted_answers(items, seed=1)


def battery(*items: Item) -> Battery:
    return Battery("b", items, Wordings.builtin(), shared=shared_answers(items))


ATLANTIS = Item(relation="capital", subject="Atlantis", answer="Poseidonis")


def test_all_parts_of_a_shipped_relation() -> None:
    found = {question.variant: question for question in questions(battery(ATLANTIS), PARTS, seed=0)}
    paraphrases = {f"p{number:02d}" for number in range(1, 11)}
    moved = {"shift_1", "shift_3", "shift_7", "comma", "colon", "space"}
    others = {"orig", "no_filler", "negated", "reversed", "wrong_role", "control"}
    assert set(found) == paraphrases | moved | others
    assert found["orig"].text.endswith("The capital of Atlantis is called simply")
    assert found["comma"].text == found["orig"].text + ","
    assert found["space"].text == found["orig"].text.replace(". ", ".  ", 1)
    assert found["wrong_role"].text.endswith("The capital of Poseidonis is called simply")
    assert found["wrong_role"].answer == found["reversed"].answer == "Atlantis"
    assert found["control"].text.endswith("The capital of France is called simply")
    assert found["shift_3"].shift == 3


def test_only_what_is_asked_for() -> None:
    def variants(*parts: str) -> set[str]:
        return {question.variant for question in questions(battery(ATLANTIS), parts, seed=0)}

    assert variants() == {"orig"}
    assert variants("wording") == {"orig", "no_filler"}
    assert variants("negation") == {"orig", "no_filler", "negated"}


def test_an_answer_that_several_subjects_have_is_not_asked_the_other_way_round() -> None:
    other = Item(relation="capital", subject="Lemuria", answer="Poseidonis")
    found = [q.variant for q in questions(battery(ATLANTIS, other), ("roles",), seed=0)]
    assert "reversed" not in found and found.count("wrong_role") == 2


def test_an_invented_subject_is_told_first() -> None:
    item = Item(relation="capital", subject="Zor", answer="Mel", invented=True)
    found = questions(battery(ATLANTIS, item), ("novelty",), seed=0)
    (told,) = [question for question in found if question.item.invented]
    assert told.variant == "novel"
    assert told.text.startswith("Zor is a country. The capital of Zor is Mel. Give the city")


def test_own_prompts_are_asked_as_they_are() -> None:
    item = Item(
        relation="colour",
        subject="grass",
        answer="green",
        foil="red",
        prompts={"orig": "Grass is", "p01": "The grass looks"},
    )
    found = {q.variant: q for q in questions(battery(item), PARTS, seed=0)}
    assert found["orig"].foil == "red"
    assert found["p01"].part == "paraphrases"
    assert "control" not in found and "no_filler" not in found
    assert found["colon"].text == "Grass is:"
