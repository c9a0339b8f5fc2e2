"""Staged reading gives the bytes of eager reading, holds what it says, and reads once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted import random_dictionary
from safetensors.torch import save_file

from layerscope.errors import DictionaryError
from layerscope.features import load, open_set, write_dictionary
from layerscope.features.staging import plan_stages, stages

LAYERS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for layer in range(LAYERS):
        dictionary = random_dictionary(
            40 + 8 * layer, 16, site=f"resid_post.{layer}", seed=layer, centered=True
        )
        write_dictionary(dictionary, tmp_path / "set" / f"l{layer}", dtype=torch.bfloat16)
    return tmp_path / "set"


@pytest.mark.parametrize("prefetch", [False, True])
def test_staged_equals_eager_and_stays_inside_the_plan(folder: Path, prefetch: bool) -> None:
    eager = open_set(folder).load()
    staged = open_set(folder)
    plan = plan_stages(staged, [3, 2, 1, 0], prefetch=prefetch)
    widest = [2 * 16 * (40 + 8 * layer) * 4 for layer in range(LAYERS)]
    expected = widest[3] + (widest[2] if prefetch else 0)
    assert plan.peak_bytes == expected + plan.vector_bytes
    assert plan.total_bytes == sum(widest) + plan.vector_bytes == eager.resident_bytes
    x = torch.randn(5, 16)
    seen: list[int] = []
    for dictionary in stages(staged, plan):
        seen.append(dictionary.layer)
        assert dictionary.encoder.resident and dictionary.decoders[0].resident
        assert staged.resident_bytes <= plan.peak_bytes
        other = eager[dictionary.layer]
        assert dictionary.encode(x).numpy().tobytes() == other.encode(x).numpy().tobytes()
        assert dictionary.encoder.tensor().numpy().tobytes() == (
            other.encoder.tensor().numpy().tobytes()
        )
    assert seen == [3, 2, 1, 0]
    assert staged.resident_bytes == plan.vector_bytes
    # The stored bf16 matrices, once each.
    assert staged.bytes_read == eager.bytes_read == sum(widest) // 2


def test_only_what_is_needed_is_held(folder: Path) -> None:
    dictionaries = open_set(folder)
    plan = plan_stages(dictionaries, decoder=False, prefetch=False)
    for dictionary in stages(dictionaries, plan):
        before = dictionary.bytes_read
        dictionary.write_directions([3, 1])
        assert dictionary.bytes_read - before == 2 * 16 * 2
        assert not dictionary.decoders[0].resident
        assert dictionaries.resident_bytes == plan.vector_bytes + dictionary.encoder.nbytes
    assert "4 layers one by one (encoder): at most" in plan.line()
    with pytest.raises(DictionaryError, match="needs neither"):
        plan_stages(dictionaries, encoder=False, decoder=False)


def test_leaving_early_leaves_nothing_behind(folder: Path) -> None:
    dictionaries = open_set(folder)
    plan = plan_stages(dictionaries)
    for _ in stages(dictionaries, plan):
        break
    assert dictionaries.resident_bytes == plan.vector_bytes


def damage(folder: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file

    path = folder / "l2" / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_one_line_when_their_layer_is_reached(folder: Path, value: float) -> None:
    damage(folder, "W_dec", value)
    dictionaries = open_set(folder)
    done: list[int] = []
    with pytest.raises(DictionaryError, match=r"'W_dec' of .*l2.* holds NaN or infinity") as caught:
        done.extend(each.layer for each in stages(dictionaries, plan_stages(dictionaries)))
    assert done == [0, 1] and "\n" not in str(caught.value)
    assert dictionaries.resident_bytes == plan_stages(dictionaries).vector_bytes
    with pytest.raises(DictionaryError, match="NaN"):
        dictionaries[2].write_directions([0])
    damage(folder, "threshold", value)
    with pytest.raises(DictionaryError, match=r"'threshold' of .* holds NaN"):
        open_set(folder)


def test_weights_of_a_wrong_dtype_or_shape_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file

    path = folder / "l2" / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "W_enc": tensors["W_enc"].to(torch.int32)}, path)
    with pytest.raises(DictionaryError, match="must be floats"):
        load(folder / "l2")
    save_file({**tensors, "W_dec": tensors["W_dec"].T.contiguous()}, path)
    with pytest.raises(DictionaryError, match="W_enc has 56 features, W_dec 16"):
        load(folder / "l2")
    save_file({**tensors, "threshold": tensors["threshold"][:3].clone()}, path)
    with pytest.raises(DictionaryError, match=r"threshold of .* has shape \[3\]"):
        load(folder / "l2")
    save_file(tensors, path)
    (folder / "l2" / "cfg.json").write_text('{"architecture": ')
    with pytest.raises(DictionaryError, match=r"cfg\.json cannot be read"):
        load(folder / "l2")
    (folder / "l2" / "cfg.json").write_text(json.dumps({"architecture": "jumpreIu"}))
    with pytest.raises(DictionaryError, match="did you mean 'jumprelu'"):
        load(folder / "l2")
