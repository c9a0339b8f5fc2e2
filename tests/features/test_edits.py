"""Feature edits write differences only: in a run, in generation, per row."""

from __future__ import annotations

import pytest
import torch
from planted import random_dictionary

from layerscope.errors import DictionaryError, EditError
from layerscope.features import (
    SparseDictionary,
    ablate_features,
    clamp_features,
    scale_features,
    set_features,
)
from layerscope.features.architectures import TopK
from layerscope.features.token_norms import TokenNorm
from layerscope.models import Site
from layerscope.models.edits import Edit
from support.loaded import batch_of, loaded

MODEL = loaded("llama")
D = MODEL.d_model
SITE = "resid_post.1"


def dictionary(**parts: object) -> SparseDictionary:
    made = random_dictionary(3 * D, D, site=SITE, centered=True)
    return made.but(**parts) if parts else made


def captured(*edits: Edit, row: int | None = None) -> torch.Tensor:
    found = MODEL.run(batch_of(), capture=SITE, edits=edits, logits=None)[SITE]
    return found if row is None else found[row]


def test_a_value_that_is_there_already_changes_no_bit() -> None:
    plain = MODEL.run(batch_of()).logits
    it = dictionary()
    h = captured()
    own = it.encode(h)
    features = [4, 0, 7]
    for edit in (
        scale_features(it, features, 1.0),
        set_features(it, features, own[..., features]),
        clamp_features(it, features, minimum=0.0),
        clamp_features(it, features, maximum=1e9),
    ):
        assert torch.equal(MODEL.run(batch_of(), edits=[edit]).logits, plain)


def test_not_even_the_sign_of_a_zero_changes() -> None:
    it = dictionary()
    h = captured()
    h[..., ::2] = -0.0
    edit = scale_features(it, [4, 7], 1.0)
    found = edit.transform(h.bfloat16(), object())  # type: ignore[arg-type]
    assert torch.equal(found.bfloat16().view(torch.int16), h.bfloat16().view(torch.int16))


def test_only_the_difference_is_written() -> None:
    it = dictionary()
    h = captured()
    f = it.encode(h, [5, 9])
    d = it.write_directions([5, 9])
    value = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(captured(set_features(it, [5, 9], value)), h + (value - f) @ d)
    torch.testing.assert_close(captured(ablate_features(it, [5, 9])), h - f @ d)
    torch.testing.assert_close(captured(scale_features(it, [5, 9], 3.0)), h + 2 * f @ d)
    low = f.clamp(0.2, 0.4)
    bounded = clamp_features(it, [5, 9], minimum=0.2, maximum=0.4)
    torch.testing.assert_close(captured(bounded), h + (low - f) @ d)


def test_rows_and_positions_are_kept_apart() -> None:
    it = dictionary()
    h = captured()
    values = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    found = captured(set_features(it, 5, values, positions=-1))
    for row, length in enumerate(batch_of().lengths):
        last = h[row, length - 1]
        expected = last + (row + 1 - it.encode(last, [5])) * it.write_directions([5])[0]
        torch.testing.assert_close(found[row, length - 1], expected)
        assert torch.equal(found[row, : length - 1], h[row, : length - 1])
    found = captured(ablate_features(it, range(3 * D), rows=1))
    assert torch.equal(found[[0, 2]], h[[0, 2]]) and not torch.equal(found[1], h[1])


@pytest.mark.parametrize("kind", ["plain", "topk", "layer_norm"])
def test_cached_generation_equals_whole_passes(kind: str) -> None:
    parts: dict[str, object] = {}
    if kind == "topk":
        parts = {"gate": TopK(8)}
    if kind == "layer_norm":
        parts = {"token_norm": TokenNorm("layer_norm")}
    it = dictionary(**parts)
    edits = [
        set_features(it, [5, 8], torch.tensor([[[3.0, 0.0]], [[0.0, 9.0]]]), rows=[0, 2]),
        scale_features(it, [1], 4.0, rows=1, scope="after_prompt"),
    ]
    made = MODEL.generate(batch_of(), edits=edits, max_new_tokens=4, eos=False, keep_logits=True)
    whole = made.batch()
    prompts = batch_of().lengths
    for row in range(3):
        edit = edits[0] if row != 1 else edits[1]
        h = MODEL.run(whole, capture=SITE, logits=None)[SITE]
        del h
        positions = [p for p in range(whole.lengths[row]) if row != 1 or p >= prompts[row]]
        single: Edit = edit
        if row != 1:
            value = edits[0].value[0 if row == 0 else 1]  # type: ignore[attr-defined,index]
            single = set_features(it, [5, 8], value, rows=row, positions=positions)
        else:
            single = scale_features(it, [1], 4.0, rows=1, positions=positions)
        logits = MODEL.run(whole, edits=[single]).logits
        assert logits is not None and made.logits is not None
        expected = logits[row, prompts[row] - 1 : whole.lengths[row] - 1]
        torch.testing.assert_close(made.logits[row], expected, rtol=1e-4, atol=1e-4)


def test_half_precision_activations_are_edited_in_float32() -> None:
    it = dictionary()
    h = captured().bfloat16()
    edit = ablate_features(it, [5])
    context = object()
    found = edit.transform(h, context)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    f = it.encode(h.float(), [5])
    torch.testing.assert_close(found, h.float() - f @ it.write_directions([5]))


def test_heads_are_flattened_and_put_back() -> None:
    width = MODEL.n_heads * (D // MODEL.n_heads)
    it = random_dictionary(40, width, site="attn.1.z")
    z = MODEL.run(batch_of(), capture="attn.1.z", logits=None)["attn.1.z"]
    found = MODEL.run(
        batch_of(), capture="attn.1.z", edits=[ablate_features(it, [2])], logits=None
    )["attn.1.z"]
    f = it.encode(z, [2])
    expected = z.flatten(-2) - f @ it.write_directions([2])
    torch.testing.assert_close(found.flatten(-2), expected)


def test_gradients_pass_through_an_edit() -> None:
    it = dictionary()
    edit = scale_features(it, [5], 0.5)
    result = MODEL.run(batch_of(), capture=["resid_post.0", SITE], edits=[edit], gradients=True)
    gradient = torch.autograd.grad(result[SITE].sum(), result["resid_post.0"])[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0


def test_edits_that_cannot_be_meant_are_refused() -> None:
    it = dictionary()
    with pytest.raises(DictionaryError, match="belongs to the space"):
        set_features(it, random_dictionary(8, D, site="mlp_out.1").id(3), 1.0)
    with pytest.raises(DictionaryError, match="not 999"):
        ablate_features(it, 999)
    with pytest.raises(EditError, match="each named once"):
        ablate_features(it, [1, 1])
    with pytest.raises(EditError, match="range 2 to 1"):
        captured(clamp_features(it, 1, minimum=2, maximum=1))
    with pytest.raises(EditError, match="has a value of shape"):
        captured(set_features(it, [1, 2], torch.zeros(3)))
    narrow = random_dictionary(40, 8, site=SITE)
    with pytest.raises(EditError, match="reads width 8"):
        captured(ablate_features(narrow, 1))
    transcoder = random_dictionary(40, D, site="mlp_in.1")
    transcoder = transcoder.but(writes=(Site("mlp_out", 1),))
    with pytest.raises(DictionaryError, match="features of a transcoder"):
        ablate_features(transcoder, 1)


def test_an_edit_gives_an_account_of_itself() -> None:
    account = scale_features(dictionary(), [3], 0.0, rows=1).describe()
    assert account["features"] == [3] and account["edit"] == "ScaleFeatures"
    assert account["dictionary"] == "dictionary:resid_post"
