"""One set of weights in Hugging Face and in TransformerLens: the same everything."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

import layerscope
from layerscope.experiments.layers import Fact, PromptSet, analyze
from layerscope.models import Add, ProjectOut, Replace, Scale, Start, TokenBatch, ZeroAblate
from support.lens_objects import (
    BRIDGE,
    FAMILIES,
    HOOKED,
    OBJECTS,
    bridge,
    hooked,
    lens,
    skip_without,
)
from support.loaded import SEQUENCES, batch_of, loaded, real
from support.shared import shared_path
from support.tiny_models import tiny, tiny_tokenizer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Projections that transformers computes in one piece, and TransformerLens by themselves.
FUSED = {"attn.q_pre", "attn.k_pre"}
# A bridge of GPT-NeoX rotates queries and keys where no hook point is.
HIDDEN = {(BRIDGE, "gpt_neox"): {"attn.q", "attn.k"}}


def vector(seed: int, width: int = 32) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=OBJECTS, ids="-".join)
def pair(request):
    """Return the kind of object, the Hugging Face model and the TransformerLens one."""
    kind, family = request.param
    skip_without(kind)
    return kind, loaded(family), lens(kind, family)


def common(reference, model):
    there = set(model.sites())
    return [site for site in reference.sites() if site in there]


@pytest.mark.parametrize("side", ("right", "left"))
def test_every_common_site_holds_the_same(pair, side):
    _, reference, model = pair
    batch = batch_of(side=side)
    sites = common(reference, model)
    expected, found = reference.run(batch, capture=sites), model.run(batch, capture=sites)
    for site in sites:
        a, b = found[site], expected[site]
        assert a.shape == b.shape, site
        if site.pos_axis == 2:  # queries and keys of real tokens; hidden keys are -inf in both
            a, b = (x.permute(0, 2, 3, 1) for x in (a, b))
        for row in range(3):
            first, second = real(a, batch, row), real(b, batch, row)
            if site.pos_axis == 2:
                keep = batch.attention_mask[row]
                first, second = first[:, keep], second[:, keep]
            torch.testing.assert_close(first, second, **CLOSE, msg=f"{site}, row {row}")


def test_sites_are_those_of_hugging_face(pair):
    kind, reference, model = pair
    ours = {site.kind for site in model.sites()}
    theirs = {site.kind for site in reference.sites()}
    assert theirs - ours == HIDDEN.get((kind, reference.family), set())
    assert ours - theirs <= FUSED
    assert model.family == reference.family
    info, expected = model.backend.info, reference.backend.info
    assert info == expected


def test_patterns_equal_eager_attention(pair):
    _, reference, model = pair
    eager = tiny(reference.family, attn_implementation="eager")
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        weights = eager(input_ids=ids, output_attentions=True).attentions
    found = model.run(ids, capture="attn.*.pattern")
    for layer, expected in enumerate(weights):
        torch.testing.assert_close(found[f"attn.{layer}.pattern"], expected, rtol=0, atol=1e-4)


def test_logits_are_bit_equal_to_the_objects_own_forward(pair):
    _, _, model = pair
    for row in SEQUENCES:
        ids = torch.tensor([row])
        with torch.no_grad():
            own = model.backend.model(ids)
        assert torch.equal(model.run(ids).logits, own)
        assert torch.equal(model.run(ids, capture=model.sites()).logits, own)


EDITS = {
    "resid_pre": lambda: [Add("resid_pre.1", vector(1), coefficient=2.0)],
    "resid_mid": lambda: [Replace("resid_mid.1", vector(2), positions=-1)],
    "resid_post": lambda: [ProjectOut("resid_post.0", vector(3))],
    "attn_in": lambda: [Add("attn_in.1", vector(4))],
    "attn_out": lambda: [Scale("attn_out.1", -0.5, rows=1)],
    "mlp_in": lambda: [Add("mlp_in.0", vector(5))],
    "mlp_out": lambda: [ZeroAblate("mlp_out.*")],
    "embed": lambda: [Add("embed", vector(6), positions=[0, 2])],
    "final_norm": lambda: [Scale("final_norm", 0.5)],
    "logits": lambda: [Scale("logits", 2.0)],
    "z": lambda: [ZeroAblate("attn.1.head.2.z")],
    "v": lambda: [ZeroAblate("attn.0.v", positions=0)],
    "q": lambda: [Scale("attn.0.q", 3.0), Scale("attn.1.head.1.q", 0.0)],
    "k": lambda: [Scale("attn.1.k", -1.0)],
    "scores": lambda: [Scale("attn.1.scores", 0.25)],
    "pattern": lambda: [ZeroAblate("attn.1.head.0.pattern")],
    "out": lambda: [Scale("attn.1.head.1.out", 4.0), Scale("attn.1.out", 0.5)],
    "pre": lambda: [Scale("mlp.0.pre", -2.0)],
    "post": lambda: [ZeroAblate("mlp.1.post", positions=1)],
}


@pytest.mark.parametrize("name", EDITS)
def test_steered_logits_are_the_same(pair, name):
    kind, reference, model = pair
    if name in ("q", "k") and f"attn.{name}" in HIDDEN.get((kind, reference.family), ()):
        pytest.skip("this bridge shows no rotated queries and keys")
    if name == "resid_mid" and reference.family == "gpt_neox":
        pytest.skip("parallel blocks have no resid_mid")
    batch, edits = batch_of(0, 2, side="left"), EDITS[name]()
    site = edits[-1].site.replace("*", "1")
    expected = reference.run(batch, edits=edits, capture=site)
    found = model.run(batch, edits=edits, capture=site)
    plain = reference.run(batch).logits
    assert not torch.allclose(real(plain, batch, 1), real(expected.logits, batch, 1), atol=1e-3)
    for row in range(2):
        torch.testing.assert_close(
            real(found.logits, batch, row), real(expected.logits, batch, row), **CLOSE
        )
    if "scores" not in name and "pattern" not in name:
        torch.testing.assert_close(
            real(found[site], batch, 0), real(expected[site], batch, 0), **CLOSE
        )


def test_padded_equals_unpadded(pair):
    _, _, model = pair
    sites = ["resid_*.*", "attn.*.z", "mlp.*.post", "final_norm"]
    for side in ("right", "left"):
        batch = batch_of(side=side)
        padded = model.run(batch, capture=sites)
        for row in range(3):
            alone = model.run(batch_of(row), capture=sites)
            torch.testing.assert_close(real(padded.logits, batch, row), alone.logits[0], **CLOSE)
            for site in alone:
                torch.testing.assert_close(real(padded[site], batch, row), alone[site][0], **CLOSE)


def test_resumed_and_stopped_passes_equal_the_full_one(pair):
    _, _, model = pair
    batch = batch_of(side="left")
    full = model.run(batch, capture="resid_*.*")
    for layer in range(model.n_layers):
        calls: list[int] = []

        def count(*_, calls=calls):
            calls.append(1)

        blocks = model.backend.structure.blocks
        handles = [block.mlp.register_forward_hook(count) for block in blocks]
        start = Start(layer, full[f"resid_pre.{layer}"])
        resumed = model.run(batch, start=start, capture=[f"resid_pre.{layer}", "resid_post.-1"])
        assert len(calls) == model.n_layers - layer
        stopped = model.run(batch, stop_after=layer, capture=f"resid_post.{layer}")
        assert len(calls) == model.n_layers + 1
        for handle in handles:
            handle.remove()
        assert stopped.logits is None
        assert torch.equal(stopped[f"resid_post.{layer}"], full[f"resid_post.{layer}"])
        for row in range(3):
            torch.testing.assert_close(
                real(resumed.logits, batch, row), real(full.logits, batch, row), **CLOSE
            )
        assert torch.equal(resumed[f"resid_pre.{layer}"], full[f"resid_pre.{layer}"])


def test_logits_at_positions_are_those_of_the_whole_pass(pair):
    _, _, model = pair
    batch = batch_of()
    full = model.run(batch, capture="final_norm")
    last = model.run(batch, logits="last", capture="final_norm")
    ends = [length - 1 for length in batch.lengths]
    torch.testing.assert_close(last.logits[:, 0], full.logits[[0, 1, 2], ends], **CLOSE)
    assert torch.equal(last["final_norm"], full["final_norm"])
    none = model.run(batch, logits=None, capture="final_norm")
    assert none.logits is None
    assert torch.equal(none["final_norm"], full["final_norm"])


@pytest.mark.parametrize("side", ("right", "left"))
def test_a_continued_pass_equals_the_pass_in_one_piece(pair, side):
    _, reference, model = pair
    whole = model.run(batch_of(0, 1, 2, side=side), capture="resid_post.-1")
    cuts = (5, 3, 4)
    edit = Add("resid_post.0", vector(8), positions=[0])
    ids = [list(SEQUENCES[row]) for row in range(3)]
    first = TokenBatch.from_ids([row[:cut] for row, cut in zip(ids, cuts, strict=True)], 0, side)
    rest = TokenBatch.from_ids([row[cut:] for row, cut in zip(ids, cuts, strict=True)], 0, side)
    sites = ["resid_post.-1", "attn.1.k" if reference.family != "gpt_neox" else "attn.1.k_pre"]
    kept = model.run(first, keep_cache=True)
    more = model.run(rest, cache=kept.cache, capture=sites, keep_cache=True)
    again = model.run(rest, cache=kept.cache, capture=sites)
    assert torch.equal(more.logits, again.logits)  # a cache is not changed by those who continue it
    assert more[sites[1]].shape[:2] == rest.ids.shape
    batch = batch_of(side=side)
    for row in range(3):
        expected = real(whole.logits, batch, row)[cuts[row] :]
        torch.testing.assert_close(real(more.logits, more.batch, row), expected, **CLOSE)
    swapped = model.run(
        TokenBatch.from_ids([ids[2][4:]]), cache=kept.cache.select([2]), logits="last"
    )
    torch.testing.assert_close(swapped.logits[0, 0], more.logits[2, rest.lengths[2] - 1], **CLOSE)
    edited = model.run(first, edits=[edit], keep_cache=True)
    after = model.run(rest, cache=edited.cache, logits="last").logits
    same = reference.run(first, edits=[edit], keep_cache=True)
    torch.testing.assert_close(
        after, reference.run(rest, cache=same.cache, logits="last").logits, **CLOSE
    )
    assert not torch.allclose(after[:, 0], model.run(rest, cache=kept.cache, logits="last").logits)


def greedy(model, prompt: str, edits, n_tokens: int) -> str:
    result = model.run(prompt, edits=edits, logits="last", keep_cache=True)
    ids = []
    for _ in range(n_tokens):
        ids.append(int(result.logits[0, -1].argmax()))
        result = model.run(
            [ids[-1:]], cache=result.cache, edits=edits, logits="last", keep_cache=True
        )
    return model.tokenizer.decode(ids)


def test_steered_greedy_text_is_the_same(pair):
    _, reference, model = pair
    prompt, edits = "The capital of France is", [Add("resid_post.1", vector(9), coefficient=20.0)]
    text = greedy(model, prompt, edits, 12)
    assert text == greedy(reference, prompt, edits, 12)
    assert text != greedy(model, prompt, [], 12)


FACTS = PromptSet(
    "three",
    tuple(
        Fact(key=f"k{n}", prompt=f"{'very ' * n}long ago the capital of {place} is", answer=" Rome")
        for n, place in enumerate(("Italy", "Japan", "France"))
    ),
)
PROBABILITIES = ("p_answer", "min_prob")


def assert_same_table(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    keys = [
        "fact_key",
        "prompt_id",
        "prompt_variant",
        "lens",
        "layer",
        "pos",
        "token",
        "norm_choice",
    ]
    assert found.select(keys).equals(expected.select(keys))
    for name in PROBABILITIES:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-4)
    for name in ("entropy_bits", "kl_to_final_bits", "resid_norm"):
        np.testing.assert_allclose(
            found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-3, atol=1e-3
        )
    assert found["answer_rank"].equals(expected["answer_rank"])
    top = zip(found["top_probs"], expected["top_probs"], strict=True)
    ids = zip(found["top_ids"], expected["top_ids"], strict=True)
    for (p, q), (a, b) in zip(top, ids, strict=True):
        p, q = p.to_numpy(), q.to_numpy()
        np.testing.assert_allclose(p, q, atol=1e-4)
        clear = np.ones(len(q), bool)  # ranks whose neighbours are further away than rounding
        apart = -np.diff(q) > 1e-5
        clear[1:] &= apart
        clear[:-1] &= apart
        clear[-1] = False
        assert np.array_equal(a.to_numpy()[clear], b.to_numpy()[clear])


def test_the_layers_table_is_the_same(pair):
    _, reference, model = pair
    found, expected = (analyze(m, FACTS).table.rows for m in (model, reference))
    assert_same_table(found, expected)


@pytest.mark.real_model
@pytest.mark.parametrize("kind", (BRIDGE, HOOKED))
def test_a_trained_model_gives_the_same_table_and_text(kind):
    skip_without(kind)
    folder = shared_path("models", "stories260K")
    reference = layerscope.load(folder)
    inner = layerscope.load(folder).backend.model
    made = bridge(inner) if kind == BRIDGE else hooked(inner)
    model = layerscope.load(made, tokenizer=reference.tokenizer)
    facts = PromptSet(
        "stories",
        (
            Fact(key="a", prompt="Once upon a time, there was a little", answer=" girl"),
            Fact(key="b", prompt="Lily and her mom went to the", answer=" park"),
        ),
    )
    assert_same_table(*(analyze(m, facts).table.rows for m in (model, reference)))
    direction = reference.run("sad", capture="resid_post.2")["resid_post.2"][0, -1]
    edits = [Add("resid_post.2", direction)]
    for prompt in ("Once upon a time", "The dog"):
        text = greedy(model, prompt, edits, 24)
        assert text == greedy(reference, prompt, edits, 24)


def test_a_folder_gets_a_bridge(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = layerscope.load(tmp_path, backend="transformer_lens")
    assert model.backend.name == "transformer_lens"
    reference = layerscope.load(tmp_path)
    prompt = "The capital of France is"
    torch.testing.assert_close(model.run(prompt).logits, reference.run(prompt).logits, **CLOSE)
    ours, theirs = model.provenance(), reference.provenance()
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["model_class"] == "TransformerBridge"
    assert "transformer_lens" in ours["versions"]


def test_families_cover_what_parity_promises():
    assert {"llama", "qwen3", "gemma2", "gpt2"} <= set(FAMILIES)
