"""Rows of different beginnings packed into one give what each gives alone."""

from __future__ import annotations

import sys

import pytest
import torch

import layerscope
from layerscope.errors import CapabilityError, ConfigError
from layerscope.models import Add, Capture, Start, TokenBatch
from layerscope.models.backends.huggingface import packing
from layerscope.models.run import Packed, Piece
from support.loaded import EVERY, hf, loaded, state_of
from support.tiny_models import tiny, tiny_tokenizer

IDS = torch.tensor([[1, 17, 40, 5, 300, 251, 8, 90], [1, 99, 180, 7, 12, 44, 3, 260]])
PIECES = (Piece(0, (1,), 8), Piece(3, (0, 1), 5), Piece(3, (0,), 2), Piece(7, (1, 0, 1), 1))
# The last token of every row.
ENDS = [7, 12, 17, 19, 20, 21, 22]


def row_of(table):
    parts = [
        table[list(piece.rows), piece.column : piece.column + piece.width].flatten(0, 1)
        for piece in PIECES
    ]
    return torch.cat(parts)[None]


def batch_of(ids):
    return TokenBatch.from_ids(ids.tolist())


def taken(model, pieces=PIECES):
    """Return a plain pass, or skip where packed rows are refused with a reason."""
    plain = model.run(batch_of(IDS), capture=["resid_pre.*", "final_norm"], keep_cache=True)
    try:
        run_packed(model, plain, pieces)
    except CapabilityError as refusal:
        assert "cannot run packed rows" in str(refusal)
        pytest.skip(str(refusal))
    return plain


def run_packed(model, plain, pieces=PIECES, layer=1, **options):
    return model.run(
        batch_of(row_of(IDS)),
        start=Start(layer, row_of(plain[f"resid_pre.{layer}"])),
        cache=plain.cache,
        packed=Packed(pieces),
        logits=None,
        **options,
    )


@pytest.mark.parametrize("family", EVERY)
def test_packed_rows_are_the_rows_apart(family):
    model = loaded(family)
    if "key-value cache" not in {held.value for held in model.backend.capabilities}:
        pytest.skip("has no cache of keys and values")
    plain = taken(model)
    before = state_of(hf(model))
    expected = row_of(plain["final_norm"])
    ends = Capture("final_norm", positions=ENDS)
    for layer in range(model.n_layers):
        found = run_packed(model, plain, layer=layer, capture="final_norm")["final_norm"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        last = run_packed(model, plain, layer=layer, capture=ends, lean=True)["final_norm"]
        torch.testing.assert_close(last, expected[:, ENDS], rtol=1e-5, atol=1e-5)
    assert state_of(hf(model)) == before


def test_families_that_matter_take_packed_rows():
    for family in ("llama", "gpt2", "olmo2", "gpt_neox", "qwen2", "qwen3_moe", "phi", "opt"):
        model = loaded(family)
        plain = model.run(batch_of(IDS), capture="resid_pre.1", keep_cache=True)
        run_packed(model, plain, capture="resid_post.1", stop_after=1)


@pytest.mark.parametrize("family", ("gemma2", "gemma3", "mistral", "cohere2", "gpt_oss", "olmo3"))
def test_windows_that_are_wide_enough_change_nothing(family):
    model = layerscope.load(tiny(family, sliding_window=64), tokenizer=tiny_tokenizer())
    plain = model.run(batch_of(IDS), capture=["resid_pre.1", "final_norm"], keep_cache=True)
    found = run_packed(model, plain, capture="final_norm")["final_norm"]
    torch.testing.assert_close(found, row_of(plain["final_norm"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ("llama", "gpt2", "olmo2", "gpt_neox"))
def test_edits_and_captures_count_the_tokens_of_the_one_row(family):
    model = loaded(family)
    plain = taken(model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    # Token 9 of the one row is position 4 of row 0.
    packed = run_packed(
        model,
        plain,
        edits=[Add("resid_pre.1", vector, positions=9)],
        capture=Capture("final_norm", positions=[12, 17]),
        lean=True,
    )["final_norm"]
    alone = model.run(
        batch_of(IDS[:1]), edits=[Add("resid_pre.1", vector, positions=4)], capture="final_norm"
    )["final_norm"]
    torch.testing.assert_close(packed[0, 0], alone[0, 7], rtol=1e-5, atol=1e-5)
    # The next row, though it stands beside it, has heard nothing.
    untouched = plain["final_norm"][1, 7]
    torch.testing.assert_close(packed[0, 1], untouched, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed[0, 0], plain["final_norm"][0, 7], atol=1e-2)


def test_the_last_block_asks_only_where_it_is_read():
    model = loaded("llama")
    plain = taken(model)
    attention = hf(model).model.layers[-1].self_attn
    seen = {}
    handles = [
        getattr(attention, name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0].shape[1]}),
        )
        for name in ("q_proj", "k_proj", "o_proj")
    ]
    try:
        run_packed(model, plain, capture=Capture("final_norm", positions=ENDS), lean=True)
        assert seen == {"q_proj": len(ENDS), "k_proj": 23, "o_proj": len(ENDS)}
        # Whoever reads another token, or looks inside the block, has it whole.
        run_packed(model, plain, capture=Capture("final_norm", positions=[3, *ENDS]), lean=True)
        assert seen["q_proj"] == 23
        inside = Capture(["final_norm", f"attn.{model.n_layers - 1}.z"], positions=ENDS)
        run_packed(model, plain, capture=inside, lean=True)
        assert seen == {"q_proj": 23, "k_proj": 23, "o_proj": 23}
    finally:
        for handle in handles:
            handle.remove()


def test_gelu_in_one_operation_is_what_the_model_computes():
    model = loaded("gpt2")
    activation = hf(model).transformer.h[1].mlp.act
    plain = taken(model)
    seen = []
    handle = activation.register_forward_hook(lambda _m, _args, output: seen.append(output))
    add = Add("mlp.1.pre", torch.full((48,), 2.0), positions=22)
    try:
        found = run_packed(model, plain, capture=["mlp.1.pre", "mlp.1.post"], edits=[add])
    finally:
        handle.remove()
    before, after = found["mlp.1.pre"], found["mlp.1.post"]
    # Edits before it count, captures and the owner's hooks see the whole of it.
    assert before.shape[1] == 23 and float(before[0, 22].mean()) > 1.5
    torch.testing.assert_close(after, activation(before), rtol=1e-6, atol=1e-6)
    assert seen[0].shape == after.shape and seen[0].equal(after)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_gate_in_one_operation_is_what_the_model_computes(family, monkeypatch):
    elementwise = pytest.importorskip("layerscope.products.elementwise")
    name = "silu_gate" if family == "llama" else "gelu_gate"
    plain_gate, gates = getattr(elementwise, name), []

    def counted(gate, up):
        gates.append(plain_gate(gate, up))
        return gates[-1]

    monkeypatch.setattr(elementwise, name, counted)
    model = loaded(family)
    mlps = [block.mlp for block in hf(model).model.layers]
    plain = taken(model)
    gates.clear()
    found = run_packed(model, plain, capture=["mlp.1.pre", "mlp.1.up", "mlp.1.post"])
    assert len(gates) == len(mlps) - 1 and gates[0].equal(found["mlp.1.post"])
    expected = mlps[1].act_fn(found["mlp.1.pre"]) * found["mlp.1.up"]
    torch.testing.assert_close(found["mlp.1.post"], expected, rtol=1e-6, atol=1e-6)
    # Nothing stays behind, and who looks at the activation sees it.
    assert not any("forward" in vars(mlp) for mlp in mlps)
    seen = []
    handle = mlps[1].act_fn.register_forward_hook(lambda _m, _args, output: seen.append(output))
    try:
        again = run_packed(model, plain, capture="mlp.1.post")["mlp.1.post"]
    finally:
        handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(again, found["mlp.1.post"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_and_rotary_embeddings_are_one_operation_each(family, monkeypatch):
    elementwise = pytest.importorskip("layerscope.products.elementwise")
    made = {"rms_norm": [], "rotate": []}

    def counting(name):
        plain = getattr(elementwise, name)

        def counted(*args):
            made[name].append(plain(*args))
            return made[name][-1]

        return counted

    for name in made:
        monkeypatch.setattr(elementwise, name, counting(name))
    model = loaded(family)
    module = sys.modules[type(hf(model)).__module__]
    before = vars(module)["apply_rotary_pos_emb"]
    plain = taken(model)
    for results in made.values():
        results.clear()
    seen = []
    norm = hf(model).model.layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    try:
        run_packed(model, plain, capture="resid_post.1", stop_after=1)
    finally:
        handle.remove()
    norms = 2 if family == "llama" else 4  # of queries and keys, too
    assert len(made["rms_norm"]) == norms and len(made["rotate"]) == 2
    torch.testing.assert_close(norm(seen[0][0]), seen[0][1], rtol=1e-6, atol=1e-6)
    # A gain that is broadcast otherwise is left to the model.
    gain = norm.weight
    try:
        norm.weight = torch.nn.Parameter(gain.detach()[None])
        made["rms_norm"].clear()
        run_packed(model, plain, capture="resid_post.1", stop_after=1)
    finally:
        norm.weight = gain
    assert len(made["rms_norm"]) == norms - 1
    # Nothing stays behind.
    assert vars(module)["apply_rotary_pos_emb"] is before
    assert not any("forward" in vars(part) for part in hf(model).modules())


def test_what_cannot_be_packed_is_refused():
    model = loaded("llama")
    plain = model.run(batch_of(IDS), capture="resid_pre.1", keep_cache=True)
    with pytest.raises(ConfigError, match=r"one row of their 23 tokens.*this batch is \[2, 8\]"):
        model.run(batch_of(IDS), packed=Packed(PIECES), cache=plain.cache)
    with pytest.raises(CapabilityError, match="scores and patterns cannot be edited"):
        edit = Add("attn.1.pattern", torch.zeros(1))
        run_packed(model, plain, edits=[edit])
    window = loaded("mistral")
    plain = window.run(batch_of(IDS), capture="resid_pre.1", keep_cache=True)
    with pytest.raises(CapabilityError, match="its windows are of 4 tokens"):
        run_packed(window, plain)


def test_a_model_whose_attention_sees_more_than_its_kernel_is_refused():
    model = layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())
    plain = model.run(batch_of(IDS), capture="resid_pre.1", keep_cache=True)
    attention = hf(model).model.layers[0].self_attn
    original = attention.forward

    def mixing(hidden_states, **options):
        output, weights = original(hidden_states, **options)
        return output + output.mean(dim=1, keepdim=True), weights

    attention.forward = mixing
    with pytest.raises(CapabilityError, match="differ from rows apart by"):
        run_packed(model, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_loops_the_kernel_is_called_for_each_piece(family, monkeypatch):
    model = loaded(family)
    plain = taken(model)
    ends = Capture("final_norm", positions=ENDS)
    for capture, lean in (("final_norm", False), (ends, True)):
        fast = run_packed(model, plain, capture=capture, lean=lean)["final_norm"]
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_loops", lambda: None)
            slow = run_packed(model, plain, capture=capture, lean=lean)["final_norm"]
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(3, (-1,), 5),
        Piece(3, (2,), 5),
        Piece(-2, (0,), 5),
        Piece(9, (0,), 1),
    ],
)
def test_pieces_that_the_cache_does_not_hold_are_refused(piece):
    model = loaded("llama")
    plain = model.run(batch_of(IDS), capture="resid_pre.1", keep_cache=True)
    row = TokenBatch(
        torch.zeros(1, piece.size, dtype=torch.long),
        torch.ones(1, piece.size, dtype=torch.bool),
        (piece.size,),
    )
    start = Start(1, torch.zeros(1, piece.size, model.d_model))
    with pytest.raises(ConfigError, match="does not fit a cache of 2 rows and 8 columns"):
        model.run(row, start=start, cache=plain.cache, packed=Packed((piece,)), logits=None)
