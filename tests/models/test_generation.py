"""Sampling, text as it comes, stopping, and what a generation refuses."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import layerscope
from layerscope.demo import model_path
from layerscope.errors import CapabilityError, ConfigError, EditError, ModelError, PromptError
from layerscope.models import (
    Add,
    Capture,
    MeanAblate,
    Replace,
    ResampleAblate,
    Scale,
    Scope,
    TokenBatch,
)
from layerscope.models.generation import Detokeniser, Sampling, StopStrings
from layerscope.models.generation.sampling import Sampler
from support.loaded import SEQUENCES, batch_of, hf, loaded
from support.tiny_models import tiny, tiny_tokenizer

TEXTS = (
    "The capital of France is Paris.",
    "你好，世界。日本語の文。한국어 문장",
    "emoji 👩‍👩‍👧‍👦 and 🇩🇪 flags 🏳️‍🌈!",
    "  two  spaces,\n\ttabs \n\n and  an end  ",
    "naïve café — “quotes” …",
    "̈a combining mark first",
)


@cache
def metaspace_tokenizer():
    """A tokenizer in the manner of SentencePiece: spaces are ▁, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁a", "▁the", "▁capital", "Paris", "▁is", "an", "en", ".", *"abcdefghijklmnopqrstuv"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("▁", "a"), ("a", "n"), ("e", "n")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@cache
def tokenizers_of(name):
    if name == "demo":
        return AutoTokenizer.from_pretrained(model_path())
    return metaspace_tokenizer() if name == "metaspace" else tiny_tokenizer()


TOKENIZERS = ("byte_level", "metaspace", "demo")


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", (1, 2, 5, 9))
def test_pieces_add_up_to_the_text_wherever_the_prompt_ends(name, text, cut):
    tokenizer = tokenizers_of(name)
    ids = tokenizer(text).input_ids
    prompt, rest = ids[:cut], ids[cut:]
    detokeniser = Detokeniser(tokenizer, prompt)
    pieces = [detokeniser.push(token) for token in rest]
    pieces.append(detokeniser.finish())
    # A character that the prompt began belongs to the continuation that completes it.
    before = whole(tokenizer, prompt).rstrip("\ufffd")
    assert before + "".join(pieces) == whole(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_ever_shows_a_part_of_a_character(name):
    tokenizer = tokenizers_of(name)
    detokeniser = Detokeniser(tokenizer)
    shown = ""
    for token in tokenizer("世界 👩‍👧 ok", add_special_tokens=False).input_ids:
        piece = detokeniser.push(token)
        assert "\ufffd" not in piece
        shown += piece
    assert shown == "世界 👩‍👧 ok"
    # Token by token, as others do it, corrupts the very same text.
    ids = tokenizer("世界 👩‍👧 ok", add_special_tokens=False).input_ids
    assert "".join(whole(tokenizer, [token]) for token in ids) != shown


@pytest.mark.parametrize("name", ("byte_level", "demo"))
def test_random_tokens_add_up_too(name):
    """Broken characters, special tokens and all: what is shown is what the whole decodes to."""
    tokenizer = tokenizers_of(name)
    generator = np.random.default_rng(0)
    for _ in range(60):
        ids = generator.integers(0, len(tokenizer), 40).tolist()
        detokeniser = Detokeniser(tokenizer, ids[:3])
        text = "".join(detokeniser.push(token) for token in ids[3:]) + detokeniser.finish()
        assert whole(tokenizer, ids[:3]).rstrip("\ufffd") + text == whole(tokenizer, ids)


def test_an_incomplete_character_at_the_end_is_given_out_as_such():
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("a世", add_special_tokens=False).input_ids
    detokeniser = Detokeniser(tokenizer)
    text = "".join(detokeniser.push(token) for token in ids[:-1])
    assert text == "a"
    assert set(detokeniser.finish()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    (
        (["one ", "two", " three"], ["two"], "one "),
        (["a\n", "\nb"], ["\n\n"], "a"),
        (["abc", "abd", "x"], ["abdx"], "abc"),
        (["aab", "aac"], ["aabaac"], ""),
        (["x E", "N", "D y"], ["END", "N"], "x E"),
        (["no", " stop"], ["stopped"], "no stop"),
        (["first second"], ["second", "first"], ""),
    ),
)
def test_stop_strings_are_found_across_pieces_and_nothing_of_them_is_shown(pieces, stops, shown):
    watch, given = StopStrings(stops), ""
    for piece in pieces:
        given += watch.push(piece)
        assert shown.startswith(given)
        if watch.stopped:
            break
    if not watch.stopped:
        given += watch.finish()
    assert given == shown
    assert watch.stopped == any(stop in "".join(pieces) for stop in stops)


def test_draws_follow_the_distribution_with_its_nucleus():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -math.inf]])
    counts = {}
    n = 4000
    for top_p, top_k, temperature in ((1.0, None, 1.0), (0.8, None, 0.7), (1.0, 2, 2.0)):
        sampler = Sampler(Sampling(temperature, top_p, top_k, seed=3), [[1]])
        draws = [sampler.choose(logits)[0][0] for _ in range(n)]
        counts = np.bincount(draws, minlength=5) / n
        p = torch.softmax(logits[0].double() / temperature, 0).numpy()
        order = np.argsort(-p)
        keep = np.zeros(5, bool)
        for index in order[: top_k or 5]:
            keep[index] = True
            if top_k is None and p[keep].sum() >= top_p:
                break
        expected = np.where(keep, p, 0) / p[keep].sum()
        assert np.abs(counts - expected).max() < 4 * math.sqrt(0.25 / n)
        assert (counts[expected == 0] == 0).all()


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([[3.0, 1.0, 1.0], [3000.0, 2999.0, 0.0]])
    for temperature in (0.0, 2.0):
        chosen, values = Sampler(Sampling(temperature), [[1], [2]]).choose(logits)
        expected = torch.log_softmax(logits.double(), -1)[torch.arange(2), chosen]
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5)


def test_a_row_draws_the_same_alone_and_in_a_batch_and_equal_prompts_draw_apart():
    model = loaded("llama")
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5, "eos": False}
    made = model.generate(batch_of(), **options)
    for row in range(3):
        assert model.generate(batch_of(row), **options).ids == made.ids[row : row + 1]
    twice = model.generate(batch_of(0, 1, 0), **options)
    assert twice.ids[:2] == made.ids[:2] and twice.ids[2] != twice.ids[0]
    other = model.generate(batch_of(0), **{**options, "seed": 6})
    assert other.ids[0] != made.ids[0]
    assert model.generate(batch_of(), **options).ids == made.ids


def test_logits_that_are_no_numbers_are_reported():
    model = loaded("llama")
    with pytest.raises(ModelError, match="logits of prompt 1 are not finite"):
        model.generate(
            batch_of(),
            edits=[Scale("resid_post.2", math.nan, rows=1, scope="after_prompt")],
            max_new_tokens=3,
        )


def first_eos(model, prompts, **options):
    """Generate with the first row's third token as a stop id."""
    free = model.generate(prompts, max_new_tokens=8, eos=False, **options)
    return free, free.ids[0][2]


def test_rows_end_by_themselves_and_the_others_go_on():
    model = loaded("mistral")
    free = model.generate(batch_of(), max_new_tokens=8, eos=False, capture="resid_post.0")
    end = free.ids[0][2]
    made = model.generate(
        batch_of(), max_new_tokens=8, eos=False, stop_ids=[end], capture="resid_post.0"
    )
    for row in range(3):
        ids = free.ids[row]
        count = ids.index(end) + 1 if end in ids else 8
        assert made.ids[row] == ids[:count]
        assert made.finish[row] == ("stop" if end in ids else "length")
        assert made.steps[row].tolist() == [step < count for step in range(made.steps.shape[1])]
        assert len(made.logprobs[row]) == count
        torch.testing.assert_close(
            made["resid_post.0"][row, :count], free["resid_post.0"][row, :count]
        )
    assert made.finish[0] == "stop" and len(made.ids[0]) <= 3


def test_the_models_own_end_ids_end_a_row_and_are_no_text():
    network = tiny("llama")
    tokenizer = tiny_tokenizer()
    model = layerscope.load(network, tokenizer=tokenizer)
    free = model.generate("One two", max_new_tokens=6, eos=False)
    network.generation_config.eos_token_id = [2, free.ids[0][1]]
    made = model.generate("One two", max_new_tokens=6)
    assert made.ids[0] == free.ids[0][: free.ids[0].index(free.ids[0][1]) + 1]
    assert made.finish == ("eos",)
    assert model.generate("One two", max_new_tokens=6, eos=False).finish == ("length",)


def test_text_stops_before_a_stop_string_and_ids_do_not():
    model = layerscope.load(model_path(), device="cpu")
    free = model.generate("Once upon a time", max_new_tokens=24)
    assert free.full_texts[0].startswith("Once upon a time")
    word = free.texts[0].split()[3]
    shown = []
    made = model.generate("Once upon a time", max_new_tokens=24, stop=word[1:], stream=shown.append)
    assert made.texts[0] == free.texts[0][: free.texts[0].index(word[1:])]
    assert made.finish == ("stop",)
    assert free.ids[0][: len(made.ids[0])] == made.ids[0]
    assert model.tokenizer.decode(made.ids[0]).count(word[1:]) == 1
    assert "".join(piece.text for piece in shown) == made.texts[0]
    assert [piece.token for piece in shown] == list(made.ids[0])
    assert shown[-1].finish == "stop" and all(piece.finish is None for piece in shown[:-1])


def test_streams_of_several_rows_add_up():
    model = layerscope.load(model_path(), device="cpu")
    stream = model.stream(["The capital of France is", "Once upon a time"], max_new_tokens=10)
    texts, steps = ["", ""], [0, 0]
    for piece in stream:
        assert piece.step == steps[piece.row]
        texts[piece.row] += piece.text
        steps[piece.row] += 1
    assert tuple(texts) == stream.result.texts
    assert steps == [len(ids) for ids in stream.result.ids]
    alone = model.generate("The capital of France is", max_new_tokens=10)
    assert alone.texts[0] == texts[0]


def test_full_text_and_batch_put_prompt_and_continuation_together():
    model = loaded("gpt2")
    made = model.generate(["The capital", "One two three"], max_new_tokens=5, eos=False)
    batch = made.batch("left")
    for row in range(2):
        assert batch.row_ids(row) == made.prompt_ids[row] + made.ids[row]
        assert made.full_texts[row] == whole(model.tokenizer, made.sequences[row])


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"capture": "attn.0.pattern"}, "it grows with every token"),
        ({"capture": "logits"}, "use keep_logits=True"),
        ({"capture": Capture("resid_post.0", positions=-1)}, "leave out the positions"),
    ),
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded("llama").generate(batch_of(), **options)


D = torch.ones(32)


@pytest.mark.parametrize(
    ("edit", "message"),
    (
        (Add("resid_post.0", D, positions=1, scope="all"), "names positions and a scope; give one"),
        (Add("resid_post.0", D, scope="promt"), "unknown scope 'promt'"),
        (Add("resid_post.0", torch.ones(9, 32)), "one token is read at a time"),
        (Add("resid_post.0", torch.ones(5)), "it needs"),
        (Add("resid_post.0", D, positions=40), "positions 0 to 11"),
        (Add("resid_post.0", D, rows=3), "names row 3"),
        (MeanAblate("resid_post.0"), "give it a mean, or scope='prompt'"),
        (ResampleAblate("resid_post.0"), "give scope='prompt'"),
        ("resid_post.0", "is not an edit"),
    ),
)
def test_edits_that_cannot_be_meant_are_refused_before_anything_runs(edit, message):
    model = loaded("llama")
    called = []
    hook = hf(model).register_forward_pre_hook(lambda *args: called.append(args))
    try:
        with pytest.raises(EditError, match=re.escape(message)):
            model.generate(batch_of(0), edits=[edit], max_new_tokens=3)
    finally:
        hook.remove()
    assert not called


def test_edits_of_the_whole_prompt_may_look_at_all_of_it():
    model = loaded("llama")
    for edit in (MeanAblate("mlp_out.1"), Add("resid_post.0", torch.ones(9, 32))):
        scoped = dataclasses.replace(edit, scope="prompt")
        made = model.generate(batch_of(0), edits=[scoped], max_new_tokens=1, keep_logits=True)
        expected = model.run(batch_of(0), edits=[edit], logits="last").logits
        torch.testing.assert_close(made.logits, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_room_is_refused_and_says_by_how_much():
    model = loaded("gpt2")
    with pytest.raises(PromptError, match=r"has 9 tokens.* go 7 beyond the model's context of 128"):
        model.generate(batch_of(), max_new_tokens=126)
    assert len(model.generate(batch_of(1), max_new_tokens=123, eos=False).ids[0]) == 123
    with pytest.raises(PromptError, match="empty"):
        model.generate([""])


def test_a_model_without_a_cache_is_refused():
    model = layerscope.load(tiny("kimi_linear"), tokenizer=tiny_tokenizer())
    with pytest.raises(CapabilityError, match="no key-value cache, which generation needs"):
        model.generate(batch_of())


def test_scopes_read_back_and_refuse_nonsense():
    assert Scope.parse("last_k:3") == Scope.last_k(3)
    assert Scope.parse("from_position:2") == Scope.from_position(2)
    assert Scope.parse("prefill_only") == Scope.prompt() == Scope.parse(Scope.prompt())
    assert str(Scope.last_k(3)) == "last 3 of prompt and generated"
    for make in (
        lambda: Scope.last_k(0),
        lambda: Scope.from_position(-2),
        lambda: Scope.parse("x"),
    ):
        with pytest.raises(EditError):
            make()


def test_in_a_run_everything_is_prompt():
    model = loaded("llama")
    last = model.run(batch_of(), edits=[Add("resid_post.0", D, scope="last_k:2")])
    expected = model.run(batch_of(), edits=[Add("resid_post.0", D, positions=[-2, -1])])
    assert torch.equal(last.logits, expected.logits)
    nothing = model.run(batch_of(), edits=[Replace("resid_post.0", D, scope="after_prompt")])
    assert torch.equal(nothing.logits, model.run(batch_of()).logits)
    with pytest.raises(EditError, match="names positions and a scope"):
        model.run(batch_of(), edits=[Add("resid_post.0", D, positions=1, scope="all")])


def test_provenance_tells_how_it_came_about():
    edit = Add("resid_post.0", D, coefficient=2.0, scope=Scope.after_prompt())
    made = loaded("llama").generate(
        TokenBatch.from_ids([SEQUENCES[0]]), edits=[edit], max_new_tokens=2, temperature=0.5
    )
    account = made.provenance()
    assert account["settings"]["temperature"] == 0.5 and account["settings"]["max_new_tokens"] == 2
    assert account["edits"][0]["scope"] == "generated"
    assert account["edits"][0]["coefficient"] == 2.0
