"""Requests that cannot be met say so in one line before anything runs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

import layerscope
from layerscope.errors import (
    CapabilityError,
    ConfigError,
    EditError,
    LensError,
    ModelError,
    PromptError,
    SiteError,
)
from layerscope.models import (
    Add,
    Apply,
    Capture,
    Clamp,
    MeanAblate,
    ProjectOut,
    Replace,
    ResampleAblate,
    Scale,
    ZeroAblate,
)
from support.loaded import batch_of, loaded
from support.tiny_models import tiny, tiny_tokenizer

ONE = torch.ones(32)


@pytest.fixture
def model():
    return loaded("llama")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Add("resid_post.1", torch.ones(31)), r"shape \[31\]; it needs \[32\], \[9, 32\] or"),
        (Add("resid_post.1", torch.ones(2, 32), positions=[0, 1, 2]), r"\[3, 32\]"),
        (Replace("mlp_out.0", torch.ones(2, 1, 32)), r"it needs \[32\], \[9, 32\] or \[3, 9, 32\]"),
        (Add("resid_post.1", torch.ones(32).long()), "needs a float tensor"),
        (Add("resid_post.1", [1.0] * 32), "needs a float tensor"),
        (MeanAblate("resid_post.1", torch.ones(3)), r"shape \[3\]"),
        (Scale("resid_post.1", 2.0, rows=3), "names row 3; this batch has rows 0 to 2"),
        (Scale("resid_post.1", 2.0, rows=[0, -3]), "each named once"),
        (Scale("resid_post.1", 2.0, rows=[]), "each named once"),
        (ZeroAblate("resid_post.1", positions=7), "ZeroAblate at 'resid_post.1': position 7"),
        (ZeroAblate("resid_post.1", positions=[]), "no position is selected"),
        (ZeroAblate("resid_post.1", positions=[[0], [1, 2], [0]]), "all of one length"),
        (ZeroAblate("resid_post.1", positions=[[0], [1]]), "each of the 3 rows"),
        (ResampleAblate("resid_post.1", from_rows=(0,)), "1 source rows for 3 selected"),
        (ResampleAblate("resid_post.1", from_rows=(0, 1, 5)), "row 5"),
        (ResampleAblate("resid_post.1", from_rows=(1, 2, 0)), "different lengths"),
        (ProjectOut("resid_post.1", torch.zeros(32)), "zero or not finite"),
        (ProjectOut("resid_post.1", torch.ones(2, 31)), r"\[k, 32\]"),
        (Clamp("resid_post.1", ONE), "give a minimum, a maximum"),
        (Clamp("resid_post.1", ONE, minimum=2.0, maximum=1.0), "range 2.0 to 1.0"),
        (Clamp("resid_post.1", torch.ones(2, 32), minimum=0.0), "takes one direction"),
        ("resid_post.1", "is not an edit"),
    ],
)
def test_bad_edits(model, edit, message):
    with pytest.raises(EditError, match=message) as caught:
        model.run(batch_of(), edits=[edit])
    assert "\n" not in str(caught.value)


def test_bad_sites_and_positions(model):
    with pytest.raises(SiteError, match=r"did you mean 'resid_post.1'"):
        model.run(batch_of(0), capture="resid_posts.1")
    with pytest.raises(SiteError, match="layers 0 to 2"):
        model.run(batch_of(0), edits=[Scale("resid_post.3", 1.0)])
    with pytest.raises(PromptError, match="position 9 is outside prompt 0"):
        model.run(batch_of(0), capture="embed", positions=9)
    with pytest.raises(PromptError, match="position 5 is outside prompt 1"):
        model.run(batch_of(), logits=5)
    with pytest.raises(ConfigError, match="use 'all', 'last'"):
        model.run(batch_of(0), logits="first")
    with pytest.raises(SiteError, match="needs the run's logits='all'"):
        model.run(batch_of(0), capture="logits", logits="last")
    result = model.run(batch_of(0), capture="resid_post.0")
    with pytest.raises(SiteError, match=r"'resid_post.1' was not captured; .*resid_post.0"):
        result["resid_post.1"]


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("llama", "attn.1.head.4.z", "head 4 of 'attn.1.head.4.z' does not exist: .* heads 0 to 3"),
        ("llama", "attn.1.kv_head.2.k", "kv_heads 0 to 1"),
        ("gpt2", "attn.1.kv_head.0.k", "every query head has its own .* use attn.1.head.0.k"),
        ("deepseek_v3", "attn.1.k_pre", "no projection of this family gives the keys"),
        ("gpt2", "mlp.0.up", "has no gate; use mlp.L.pre"),
        ("llama", "mlp.0.router", "no mixture of experts"),
        ("gptj", "attn.0.q", "attention code of its own"),
    ],
)
def test_sites_that_a_model_lacks_say_why(family, site, message):
    with pytest.raises((CapabilityError, SiteError), match=message) as caught:
        loaded(family).run(batch_of(0), capture=site)
    assert "\n" not in str(caught.value)


def test_a_query_head_cannot_change_keys_that_others_share(model):
    with pytest.raises(CapabilityError, match=r"edit attn.1.kv_head.1.k"):
        model.run(batch_of(0), edits=[Scale("attn.1.head.3.k", 2.0)])
    loaded("gpt2").run(batch_of(0), edits=[Scale("attn.1.head.3.k", 2.0)])


def test_parallel_blocks_have_no_residual_in_the_middle():
    parallel = loaded("gpt_neox")
    with pytest.raises(
        CapabilityError, match=r"'resid_mid.1' does not exist in gpt_neox.*parallel"
    ):
        parallel.run(batch_of(0), capture="resid_mid.1")
    assert len(parallel.run(batch_of(0), capture="resid_*.1").activations) == 2


def test_prompts_that_cannot_be_run(model):
    with pytest.raises(PromptError, match="129 tokens"):
        model.run([list(range(3, 132))])
    with pytest.raises(PromptError, match="384"):
        model.run([[1, 384]])
    with pytest.raises(PromptError, match="padding id 0 and has no mask"):
        model.run(torch.tensor([[0, 0, 5], [1, 2, 3]]))


def test_models_that_are_not_causal():
    config = BertConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ModelError, match="encoder"):
        layerscope.load(BertLMHeadModel(config), tokenizer=tiny_tokenizer())
    t5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        layerscope.load(T5ForConditionalGeneration(t5), tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="causal"):
        layerscope.load(tiny("llama").model, tokenizer=tiny_tokenizer())


def test_unknown_backend_and_rows(model):
    with pytest.raises(ConfigError, match="did you mean 'huggingface'"):
        layerscope.load("x", backend="hugingface")
    with pytest.raises(LensError, match="rows 0 to 3"):
        model.norm_at(4, "final")
    with pytest.raises(LensError, match="'final' or 'next_norm'"):
        model.norm_at(0, "last")  # type: ignore[arg-type]


def test_the_face_of_a_model(model):
    assert (model.n_layers, model.d_model, model.d_vocab, model.n_ctx) == (3, 32, 384, 128)
    assert (model.n_heads, model.n_kv_heads, model.family) == (4, 2, "llama")
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.unembedding.weight is model.backend.model.lm_head.weight
    ids = model.tokenize("The capital of Germany").row_ids(0)
    assert ids[0] == 1 and "".join(map(model.decode_token, ids[1:])) == "The capital of Germany"
    assert len(model.token_strings()) == 384 and model.token_strings()[ids[2]] == " capital"
    assert "llama, 3 layers" in repr(model)
    record = json.loads(json.dumps(model.provenance(), allow_nan=False))
    assert (
        record["verified"] and record["family"] == "llama" and len(record["weights_sha256"]) == 64
    )
    assert loaded("gemma2").unembedding.softcap == 3.0
    granite = loaded("granite").unembedding
    assert granite.scale == pytest.approx(1 / 3.0)


def test_edits_describe_themselves_for_provenance():
    edits = [
        Add("resid_post.1", ONE, coefficient=2.0, rows=[0], positions=-1),
        Apply("embed", lambda x, _: x),
        ProjectOut("embed", torch.ones(2, 32)),
    ]
    records = json.loads(json.dumps([edit.describe() for edit in edits]))
    assert records[0]["edit"] == "Add" and records[0]["value"]["shape"] == [32]
    assert records[0]["coefficient"] == 2.0 and records[0]["positions"] == -1


def test_captures_are_reusable_values():
    capture = Capture("resid_post.*", positions=-1)
    assert capture == Capture("resid_post.*", positions=-1)
