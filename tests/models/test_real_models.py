"""Trained models that others published, with the numbers that their authors recorded."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch

import layerscope
from support.shared import shared_path

pytestmark = pytest.mark.real_model
NAMES = ("gpt-nano-sort", "stories260K", "babyllama-tok105", "mingpt-adder")


@pytest.mark.parametrize("name", NAMES)
def test_identities_hold(name):
    model = layerscope.load(shared_path("models", name))
    assert model.name == name
    assert model.identities.passed
    assert len(model.identities.identities) == 11


def recorded(entry):
    data = np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32)
    return torch.from_numpy(data.copy()).view(entry["shape"])


def test_captures_equal_what_the_author_recorded():
    folder = shared_path("models", "gpt-nano-sort")
    record = json.loads((folder / "recorded-activations.json").read_text())
    model = layerscope.load(folder)
    result = model.run(recorded(record["idx"]).long(), capture=model.sites())
    theirs = {
        "embed": "tok_emb",
        "resid_pre.0": "x",
        "attn_in.0": "ln1",
        "attn_out.0": "yProj",
        "resid_mid.0": "attnResid",
        "mlp_in.0": "ln2",
        "mlp_out.0": "mlp",
        "resid_post.0": "block0",
        "resid_post.1": "block1",
        "resid_post.2": "block2",
        "final_norm": "ln_f",
        "logits": "lm_head",
    }
    for ours, name in theirs.items():
        expected = recorded(record[name])
        torch.testing.assert_close(result[ours], expected, rtol=1e-5, atol=1e-5, msg=ours)


def test_the_adder_adds():
    model = layerscope.load(shared_path("models", "mingpt-adder"))
    ids = [[8, 5, 5, 0]]
    for _ in range(2):
        ids = [[*ids[0], int(model.run(ids, logits="last").logits.argmax())]]
    last = int(model.run(ids, logits="last").logits.argmax())
    assert [*ids[0][4:], last] == [5, 3, 1]  # 85 + 50 = 135, least significant digit first


def test_a_story_goes_on():
    model = layerscope.load(shared_path("models", "stories260K"))
    result = model.run("Once upon a time, there was a little girl named", logits="last")
    assert model.decode_token(int(result.logits.argmax())).strip().startswith("L")
