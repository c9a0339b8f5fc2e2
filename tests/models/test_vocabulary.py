from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerscope.models.vocabulary import (
    decode_tokens,
    ignore_mask,
    is_ignorable,
    token_scheme,
    token_strings,
)
from support.shared import shared_path
from support.tiny_models import tiny_tokenizer


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: it splits at spaces and has no unknown token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "<0x0A>": 4, "<0xE6>": 5, "<0xZZ>": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_byte_level_tokens_keep_their_leading_space_and_join_to_the_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "The capital of Germany — naïve 日本"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    strings = token_strings(tokenizer, len(tokenizer))
    assert token_scheme(tokenizer) == "byte_level"
    assert " capital" in strings
    whole = [strings[id_] for id_ in ids if "\ufffd" not in strings[id_]]
    assert "".join(whole).startswith("The capital of Germany")
    assert decode_tokens(tokenizer, ids) == [strings[id_] for id_ in ids]
    assert strings == tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))])


def test_metaspace_tokens_become_spaces_and_bytes() -> None:
    strings = token_strings(metaspace_tokenizer(), 7)
    assert strings == ["<unk>", " ", "a", " a", "\n", "\ufffd", "<0xZZ>"]


def test_other_tokenizers_decode_their_own_tokens() -> None:
    assert token_scheme(word_tokenizer(["A", "B"])) == "decode"
    assert token_strings(word_tokenizer(["A", "B"]), 4) == ["A", "B", "", ""]


def test_a_vocabulary_padded_beyond_the_tokenizer_gives_empty_texts_that_are_not_ignored() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    strings = token_strings(tokenizer, size + 3)
    assert strings[size:] == ["", "", ""]
    assert not ignore_mask(tokenizer, size + 3)[size:].any()


def test_the_cache_returns_fresh_lists_and_sees_new_tokens() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    token_strings(tokenizer, size)[0] = "spoilt"
    assert token_strings(tokenizer, size)[0] == "<pad>"
    assert token_strings(tokenizer, size + 1)[size] == ""
    tokenizer.add_tokens(["café"])
    assert token_strings(tokenizer, size + 1)[size] == "café"
    assert len(token_strings(tokenizer, 5)) == 5


@pytest.mark.parametrize(
    ("text", "ignorable"),
    [
        ("", False),
        (" ", True),
        ("\n\t\u00a0\u3000", True),
        ("。", True),
        (" «", True),
        ("”…", True),
        ("\x07\u200b", True),
        ("▁", True),
        ("Ġ", True),
        ("Ċ", True),
        ("$", True),
        ("€", False),
        ("→", False),
        ("\ufffd", False),
        ("a", False),
        (" 7", False),
        ("Ġorġ", False),
        (None, False),
    ],
)
def test_ignorable_by_unicode_category(text: str | None, ignorable: bool) -> None:
    assert is_ignorable(text) is ignorable


def test_symbols_are_ignored_only_when_asked() -> None:
    tokenizer = word_tokenizer(["→", ",", "x", "\ufffd"])
    assert ignore_mask(tokenizer, 4).tolist() == [False, True, False, False]
    assert ignore_mask(tokenizer, 4, ignore_symbols=True).tolist() == [True, True, False, False]


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_pythia"])
def test_real_byte_level_vocabularies_decode_as_the_tokenizer_decodes_them(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_path("tokenizers", name))
    strings = token_strings(tokenizer, len(tokenizer))
    assert strings == tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))])


@pytest.mark.real_model
def test_real_sentencepiece_vocabulary_differs_only_in_the_leading_space() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_path("models", "stories260K"))
    strings = token_strings(tokenizer, len(tokenizer))
    alone = tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))])
    assert [text.removeprefix(" ") for text in strings] == [
        text.removeprefix(" ") for text in alone
    ]
    assert strings[tokenizer.convert_tokens_to_ids("▁Once")] == " Once"
