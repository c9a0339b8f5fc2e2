from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from layerscope.errors import AlignmentError
from layerscope.models.answers import align_answer
from support.shared import shared_path
from support.tiny_models import tiny_tokenizer

PROMPT = "Give the city name only, plain text. The capital of Germany is called simply"


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def real(*folder: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_path(*folder))


def letters(vocabulary: str, unknown: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with or without a token for unknown ones."""
    words = {character: index for index, character in enumerate(vocabulary)}
    if unknown:
        words["<unk>"] = len(words)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>" if unknown else None
    )


def test_the_ids_continue_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    alignment = align_answer(tokenizer, PROMPT, "Berlin")
    assert alignment.ok and alignment.variant == "with_space"
    assert plain(tokenizer, PROMPT) + alignment.ids == plain(tokenizer, PROMPT + " Berlin")
    assert alignment.first_id == alignment.ids[0]
    assert alignment.pieces == tuple(tokenizer.convert_ids_to_tokens(list(alignment.ids)))[:4]
    assert not alignment.blank_first


def test_a_long_answer_keeps_all_ids_and_four_pieces() -> None:
    alignment = align_answer(tiny_tokenizer(), PROMPT, "Berlin Berlin Berlin Berlin Berlin")
    assert len(alignment.ids) > 4 and len(alignment.pieces) == 4


def test_without_a_token_for_the_space_the_answer_follows_directly() -> None:
    alignment = align_answer(letters("ABC"), "ABC", "AB")
    assert (alignment.ids, alignment.variant) == ((0, 1), "no_space")
    alignment = align_answer(letters("ABC", unknown=True), "ABC", "AB")
    assert (alignment.ids, alignment.variant) == ((0, 1), "no_space")


def test_a_prompt_that_ends_in_whitespace_gets_no_second_space() -> None:
    tokenizer = tiny_tokenizer()
    alignment = align_answer(tokenizer, "Q:\n", "Berlin")
    assert alignment.variant == "no_space"
    assert plain(tokenizer, "Q:\n") + alignment.ids == plain(tokenizer, "Q:\nBerlin")
    assert align_answer(tokenizer, "Q:\n", " Berlin") == alignment


def test_a_trailing_space_that_merges_with_the_answer_is_refused_with_the_fix() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(AlignmentError) as caught:
        align_answer(tokenizer, "The capital is ", "Berlin")
    message = str(caught.value)
    assert "starts inside a token" in message and "drop the whitespace" in message
    assert "' '" in message and "' Ber" in message and "\n" not in message


def test_an_answer_inside_a_token_is_refused_with_both_tokenisations() -> None:
    tokenizer = tiny_tokenizer()
    assert len(plain(tokenizer, " Ber")) == 1
    with pytest.raises(AlignmentError, match=r"alone ends in .*' ', 'B'.*the answer in .*' Ber'"):
        align_answer(tokenizer, "The capital is B", "er", variant="no_space")
    loose = align_answer(tokenizer, "The capital is B", "er", variant="no_space", strict=False)
    assert loose.status == "starts_inside_token"
    assert (loose.ids, loose.first_id, loose.pieces, loose.variant) == ((), None, (), None)


def test_a_longer_tokenisation_alone_is_not_an_alignment() -> None:
    # " capital" swallows the prompt's last token, yet prompt and answer together are longer.
    tokenizer = tiny_tokenizer()
    base, full = plain(tokenizer, "The cap"), plain(tokenizer, "The capital of Germany")
    assert len(full) > len(base) and full[: len(base)] != base
    alignment = align_answer(
        tokenizer, "The cap", "ital of Germany", variant="no_space", strict=False
    )
    assert alignment.status == "starts_inside_token"


def test_an_answer_with_its_own_space_keeps_it() -> None:
    tokenizer = tiny_tokenizer()
    assert align_answer(tokenizer, PROMPT, " Berlin") == align_answer(tokenizer, PROMPT, "Berlin")
    refused = align_answer(tokenizer, PROMPT, " Berlin", variant="no_space", strict=False)
    assert not refused.ok and "leave variant out" in refused.message


def test_whitespace_after_the_answer_is_dropped() -> None:
    tokenizer = tiny_tokenizer()
    assert align_answer(tokenizer, PROMPT, "Berlin \n") == align_answer(tokenizer, PROMPT, "Berlin")


def test_a_first_token_that_is_only_a_space_is_said_so() -> None:
    alignment = align_answer(letters(" ABC"), "AB", "C")
    assert (alignment.ids, alignment.blank_first) == ((0, 3), True)


@pytest.mark.parametrize(
    ("prompt", "answer", "status"),
    [
        ("", "A", "empty_prompt"),
        ("A", "", "empty_answer"),
        ("A", "  ", "empty_answer"),
        ("A", "X", "unknown_token"),
    ],
)
def test_other_reasons(prompt: str, answer: str, status: str) -> None:
    tokenizer = letters("ABC", unknown=True)
    alignment = align_answer(tokenizer, prompt, answer, strict=False)
    assert alignment.status == status and not alignment.ok and alignment.message
    with pytest.raises(AlignmentError):
        align_answer(tokenizer, prompt, answer)


def test_text_the_tokenizer_cannot_encode() -> None:
    for prompt, answer in (("X", "A"), ("A", "X")):
        alignment = align_answer(letters("ABC"), prompt, answer, strict=False)
        assert alignment.status == "not_encodable"


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("folder", "first", "pieces"),
    [
        (("tokenizers", "gpt2"), 11307, ("ĠBerlin",)),
        (("tokenizers", "gpt_neox_pythia"), 12911, ("ĠBerlin",)),
        (("models", "stories260K"), 368, ("▁B", "er", "l", "in")),
    ],
)
def test_real_tokenizers(folder: tuple[str, str], first: int, pieces: tuple[str, ...]) -> None:
    tokenizer = real(*folder)
    alignment = align_answer(tokenizer, PROMPT, "Berlin")
    assert (alignment.first_id, alignment.pieces) == (first, pieces)
    assert plain(tokenizer, PROMPT) + alignment.ids == plain(tokenizer, PROMPT + " Berlin")
    with pytest.raises(AlignmentError, match="drop the whitespace"):
        align_answer(tokenizer, PROMPT + " ", "Berlin")


@pytest.mark.real_model
def test_real_character_and_digit_tokenizers() -> None:
    characters = align_answer(real("models", "babyllama-tok105"), PROMPT, "Berlin")
    assert characters.blank_first and len(characters.ids) == len(" Berlin")
    digits = align_answer(real("models", "mingpt-adder"), "1234", "046")
    assert (digits.ids, digits.variant) == ((0, 4, 6), "no_space")
