from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerscope.errors import ConfigError, PromptError
from layerscope.models.prompt import render
from layerscope.models.prompts import Prompt, TokenBatch, leading_specials, tokenize
from support.chat_templates import LLAMA3, STYLES, chat_tokenizer
from support.shared import shared_path
from support.tiny_models import tiny_tokenizer

TEXTS = ["The capital of Germany is", "Paris", "One two three"]


def with_post_processor(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another template of special tokens around a text."""
    tokenizer = tiny_tokenizer()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = [token for token in ("<bos>", "<eos>", "<pad>") if token in template]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class TestBos:
    def test_one_bos_where_the_tokenizer_adds_one(self) -> None:
        tokenizer = tiny_tokenizer()
        batch = tokenize(tokenizer, TEXTS)
        for row, text in enumerate(TEXTS):
            assert batch.row_ids(row) == (tokenizer.bos_token_id, *plain(tokenizer, text))

    def test_a_text_that_spells_its_bos_gets_no_second_one(self) -> None:
        tokenizer = tiny_tokenizer()
        batch = tokenize(tokenizer, ["<bos>Paris", "Paris", "<bos>"])
        assert batch.row_ids(0) == batch.row_ids(1)
        assert batch.row_ids(2) == (tokenizer.bos_token_id,)
        assert tokenize(tokenizer, "<bos>Paris", prepend_bos=True).row_ids(0) == batch.row_ids(0)

    def test_two_spelt_bos_are_refused(self) -> None:
        with pytest.raises(PromptError, match="two BOS"):
            tokenize(tiny_tokenizer(), "<bos><bos>Paris")

    def test_a_tokenizer_without_bos_gets_none(self) -> None:
        tokenizer = tiny_tokenizer(bos=False)
        assert tokenize(tokenizer, "Paris").row_ids(0) == plain(tokenizer, "Paris")

    def test_a_bos_token_that_the_tokenizer_does_not_add_is_not_added(self) -> None:
        tokenizer = with_post_processor("$A")
        assert tokenizer.bos_token_id is not None
        assert tokenize(tokenizer, "Paris").row_ids(0) == plain(tokenizer, "Paris")

    @pytest.mark.parametrize("template", ["<bos> $A <eos>", "<bos> $A <eos> <eos>"])
    def test_an_appended_eos_is_never_kept(self, template: str) -> None:
        tokenizer = with_post_processor(template)
        expected = (tokenizer.bos_token_id, *plain(tokenizer, "Paris"))
        assert tokenize(tokenizer, "Paris").row_ids(0) == expected

    def test_every_leading_special_is_kept(self) -> None:
        tokenizer = with_post_processor("<pad> <bos> $A <eos>")
        assert leading_specials(tokenizer) == (0, tokenizer.bos_token_id)
        assert tokenize(tokenizer, "Paris").row_ids(0)[:2] == (0, tokenizer.bos_token_id)
        assert tokenize(tokenizer, "<bos>Paris").row_ids(0)[:2] == (0, tokenizer.bos_token_id)

    def test_the_flag_of_the_tokenizer_is_not_believed(self) -> None:
        tokenizer = tiny_tokenizer()
        assert not tokenizer.add_bos_token
        assert tokenize(tokenizer, "Paris").row_ids(0)[0] == tokenizer.bos_token_id

    def test_overrides(self) -> None:
        tokenizer = tiny_tokenizer()
        bos = tokenizer.bos_token_id
        assert tokenize(tokenizer, "Paris", prepend_bos=False).row_ids(0)[0] != bos
        never = with_post_processor("$A")
        assert tokenize(never, "Paris", prepend_bos=True).row_ids(0)[0] == bos
        ids = tokenize(never, Prompt(ids=(7, 8)), prepend_bos=True)
        assert ids.row_ids(0) == (bos, 7, 8)
        assert tokenize(never, Prompt(ids=(bos, 8)), prepend_bos=True).row_ids(0) == (bos, 8)

    def test_asking_for_a_bos_that_does_not_exist(self) -> None:
        with pytest.raises(PromptError, match="has none"):
            tokenize(tiny_tokenizer(bos=False), "Paris", prepend_bos=True)

    def test_ids_are_taken_as_they_are(self) -> None:
        batch = tokenize(tiny_tokenizer(), [Prompt(ids=(5, 6)), [9]])
        assert [batch.row_ids(row) for row in range(2)] == [(5, 6), (9,)]

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize("adds", [True, False])
    @pytest.mark.parametrize("prepend_bos", [None, True])
    def test_a_chat_has_one_bos_whoever_writes_it(
        self, style: str, adds: bool, prepend_bos: bool | None
    ) -> None:
        tokenizer = with_post_processor("<bos> $A" if adds else "$A")
        tokenizer.chat_template = STYLES[style]
        chats = [
            Prompt("Paris", format="chat"),
            Prompt(messages=[("user", "One"), ("assistant", "two"), ("user", "three")]),
            Prompt("Paris", answer_prefix="It is"),
        ]
        batch = tokenize(tokenizer, chats, prepend_bos=prepend_bos)
        expected = int(adds or bool(prepend_bos) or style != "chatml")
        for row in range(len(chats)):
            ids = batch.row_ids(row)
            assert ids.count(tokenizer.bos_token_id) == expected
            assert (ids[0] == tokenizer.bos_token_id) == bool(expected)

    def test_a_rendered_chat_given_as_a_string_is_the_same_prompt(self) -> None:
        for style in STYLES.values():
            tokenizer = chat_tokenizer(style)
            prompt = Prompt("The capital of France?", format="chat")
            text = render(tokenizer, prompt).text
            assert tokenize(tokenizer, text).row_ids(0) == tokenize(tokenizer, prompt).row_ids(0)


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_masks_positions_and_columns(self, side: Any) -> None:
        tokenizer = tiny_tokenizer()
        batch = tokenize(tokenizer, TEXTS, padding_side=side)
        positions = batch.position_ids()
        for row, length in enumerate(batch.lengths):
            real = batch.attention_mask[row]
            assert tuple(batch.ids[row][real].tolist()) == batch.row_ids(row)
            assert positions[row][real].tolist() == list(range(length))
            assert positions[row][~real].eq(0).all()
            assert batch.ids[row][~real].eq(tokenizer.pad_token_id).all()
            for position in range(-length, length):
                column = batch.column(row, position)
                assert int(batch.ids[row, column]) == batch.row_ids(row)[position]
        rows, chosen = range(len(batch)), [[-1, 0]] * len(batch)
        expected = [[batch.column(row, -1), batch.column(row, 0)] for row in rows]
        assert batch.columns(rows, chosen).tolist() == expected
        with pytest.raises(PromptError, match="is outside prompt 1"):
            batch.columns([0, 1], [[0], [99]])
        # Behind a past, positions count the whole sequence.
        continued = batch.continuing(torch.ones(len(batch), 2, dtype=torch.bool))
        assert continued.columns([1], [[2, -1]]).tolist() == [
            [continued.column(1, 2), continued.column(1, -1)]
        ]

    def test_no_padding_token_is_needed(self) -> None:
        batch = tokenize(tiny_tokenizer(pad=False), TEXTS)
        assert batch.attention_mask.sum().item() == sum(batch.lengths)

    def test_a_padding_token_beyond_the_model_is_not_fed_to_it(self) -> None:
        tokenizer = tiny_tokenizer(pad=False)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        size = tokenizer.pad_token_id
        assert int(tokenize(tokenizer, TEXTS, vocab_size=size).ids.max()) < size

    @pytest.mark.parametrize("position", [3, -4, 100])
    def test_a_position_outside_the_prompt(self, position: int) -> None:
        batch = TokenBatch.from_ids([[1, 2, 3], [1, 2, 3, 4]])
        with pytest.raises(PromptError, match="use -3 to 2"):
            batch.column(0, position)

    def test_a_row_outside_the_batch(self) -> None:
        with pytest.raises(PromptError, match="no prompt 2"):
            TokenBatch.from_ids([[1], [2]]).row_ids(2)

    def test_batches_come_from_tensors_with_their_masks(self) -> None:
        ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        batch = tokenize(tiny_tokenizer(), {"input_ids": ids, "attention_mask": mask})
        assert batch.padding_side == "left" and batch.lengths == (2, 3)
        assert tokenize(tiny_tokenizer(), batch) is batch

    def test_a_mask_with_a_hole_is_refused(self) -> None:
        with pytest.raises(PromptError, match="in one piece"):
            TokenBatch.from_tensors(torch.ones(1, 3).long(), torch.tensor([[1, 0, 1]]))

    @pytest.mark.parametrize("ids", [[[5, 6, 0], [7, 8, 9]], torch.tensor([[0, 5], [6, 7]])])
    def test_padded_ids_without_a_mask_are_refused(self, ids: Any) -> None:
        with pytest.raises(PromptError, match="pass a TokenBatch or an attention mask"):
            tokenize(tiny_tokenizer(), ids)

    def test_a_bos_that_doubles_as_padding_may_lead(self) -> None:
        tokenizer = with_post_processor("<bos> $A")
        tokenizer.pad_token = "<bos>"
        bos = tokenizer.bos_token_id
        assert tokenize(tokenizer, torch.tensor([[bos, 5, 6]])).lengths == (3,)
        with pytest.raises(PromptError, match="padding id"):
            tokenize(tokenizer, torch.tensor([[bos, bos, 6]]))

    def test_a_prompt_of_ids_may_contain_any_id(self) -> None:
        assert tokenize(tiny_tokenizer(), Prompt(ids=(5, 0))).row_ids(0) == (5, 0)

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4),
        st.sampled_from(["left", "right"]),
    )
    def test_padding_never_changes_rows(self, rows: list[list[int]], side: Any) -> None:
        batch = TokenBatch.from_ids(rows, pad_id=3, padding_side=side)
        assert [batch.row_ids(row) for row in range(len(batch))] == [tuple(row) for row in rows]
        again = TokenBatch.from_tensors(batch.ids, batch.attention_mask)
        assert [again.row_ids(row) for row in range(len(again))] == [tuple(row) for row in rows]

    def test_moving_keeps_the_rest(self) -> None:
        batch = tokenize(tiny_tokenizer(), TEXTS, padding_side="left")
        moved = batch.to("meta")
        assert moved.ids.device.type == "meta" and moved.lengths == batch.lengths
        assert moved.offsets == batch.offsets


class TestOffsets:
    def test_spans_cut_the_tokens_out_of_the_text(self) -> None:
        tokenizer, text = tiny_tokenizer(), "The capital — naïve"
        batch = tokenize(tokenizer, [text, Prompt(ids=(5, 6))], padding_side="left")
        spans = batch.offsets[0]
        assert spans is not None and spans[0] is None and batch.offsets[1] is None
        assert len(spans) == batch.lengths[0]
        for span, token in zip(spans[1:], batch.tokens(0, tokenizer)[1:], strict=True):
            assert span is not None
            if "\ufffd" not in token:
                assert text[slice(*span)].strip() == token.strip()

    def test_spans_of_a_chat_find_what_the_user_said(self) -> None:
        tokenizer = chat_tokenizer(LLAMA3)
        prompt = Prompt("The capital of France", system="One two", answer_prefix="Paris")
        rendered, batch = render(tokenizer, prompt), tokenize(tokenizer, prompt)
        spans = batch.offsets[0]
        assert spans is not None and rendered.parts is not None
        ids = batch.row_ids(0)
        for part, said in zip(
            rendered.parts, ("One two", "The capital of France", "Paris"), strict=True
        ):
            inside = [
                id_
                for id_, span in zip(ids, spans, strict=True)
                if span is not None and part[0] <= span[0] and span[1] <= part[1]
            ]
            assert tokenizer.decode(inside) == said

    def test_tokens_are_text(self) -> None:
        tokenizer = tiny_tokenizer()
        tokens = tokenize(tokenizer, "The capital").tokens(0, tokenizer)
        assert tokens[0] == "<bos>" and "".join(tokens[1:]) == "The capital"


class TestBadInput:
    @pytest.mark.parametrize("prompts", ["", ["Paris", ""], [[]], [], torch.zeros(1, 0).long()])
    def test_empty(self, prompts: Any) -> None:
        with pytest.raises(PromptError):
            tokenize(tiny_tokenizer(), prompts)

    def test_too_long_names_both_lengths_and_the_key(self) -> None:
        length = tokenize(tiny_tokenizer(), TEXTS[0]).lengths[0]
        assert tokenize(tiny_tokenizer(), TEXTS[0], max_length=length).lengths == (length,)
        message = rf"prompt 1 \('long'\) has {length} tokens .* holds {length - 1}"
        with pytest.raises(PromptError, match=message):
            prompts = ["a", Prompt(TEXTS[0], key="long")]
            tokenize(tiny_tokenizer(), prompts, max_length=length - 1)

    @pytest.mark.parametrize("id_", [-1, 384])
    def test_ids_outside_the_vocabulary(self, id_: int) -> None:
        with pytest.raises(PromptError, match=f"id {id_}, outside the vocabulary of 384"):
            tokenize(tiny_tokenizer(), [[5, id_]])
        batch = TokenBatch.from_ids([[5, id_]])
        with pytest.raises(PromptError, match="outside the vocabulary"):
            tokenize(tiny_tokenizer(), batch)

    def test_a_padded_vocabulary_of_the_model_counts(self) -> None:
        assert tokenize(tiny_tokenizer(), [[384]], vocab_size=400).row_ids(0) == (384,)

    @pytest.mark.parametrize(
        "prompts", [[1.5], [[1.5]], [None], torch.zeros(2, 2), torch.zeros(1, 2, 2).long()]
    )
    def test_things_that_are_not_prompts(self, prompts: Any) -> None:
        with pytest.raises(PromptError):
            tokenize(tiny_tokenizer(), prompts)

    def test_a_mapping_without_mask_or_ragged(self) -> None:
        with pytest.raises(PromptError, match="attention_mask"):
            tokenize(tiny_tokenizer(), {"input_ids": torch.ones(1, 2).long()})
        with pytest.raises(PromptError, match="rectangular"):
            tokenize(
                tiny_tokenizer(), {"input_ids": [[1], [1, 2]], "attention_mask": [[1], [1, 1]]}
            )

    def test_a_batch_cannot_be_given_a_bos(self) -> None:
        with pytest.raises(PromptError, match="cannot change a batch"):
            tokenize(tiny_tokenizer(), TokenBatch.from_ids([[5]]), prepend_bos=True)

    def test_a_prompt_is_a_text_or_ids(self) -> None:
        for arguments in ({}, {"text": "a", "ids": (1,)}):
            with pytest.raises(PromptError, match="exactly one"):
                Prompt(**arguments)

    def test_an_unknown_padding_side(self) -> None:
        with pytest.raises(ConfigError, match="'left' or 'right'"):
            tokenize(tiny_tokenizer(), "Paris", padding_side="middle")  # type: ignore[arg-type]

    def test_a_word_the_vocabulary_lacks(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"A": 0, "B": 1}))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        assert tokenize(words, "A B").row_ids(0) == (0, 1)
        with pytest.raises(PromptError, match="prompt 1: the tokenizer cannot encode 'A C'"):
            tokenize(words, ["A", "A C"])


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("folder", "text", "bos"),
    [
        (("tokenizers", "gpt2"), "Once upon", False),
        (("tokenizers", "gpt_neox_pythia"), "Once upon", False),
        (("models", "stories260K"), "Once upon", True),
        (("models", "babyllama-tok105"), "Once upon", True),
        (("models", "gpt-nano-sort"), "CAB", False),
        (("models", "mingpt-adder"), "1234", False),
    ],
)
def test_real_tokenizers_give_one_bos_or_none(
    folder: tuple[str, str], text: str, bos: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_path(*folder))
    ids = tokenize(tokenizer, text).row_ids(0)
    assert list(ids) == tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == int(bos)
    if tokenizer.bos_token is not None:
        spelt = tokenize(tokenizer, tokenizer.bos_token + text).row_ids(0)
        assert spelt.count(tokenizer.bos_token_id) == 1
