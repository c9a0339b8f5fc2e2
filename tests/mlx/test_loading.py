"""What the MLX backend loads, in which dtype, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

import layerscope
from layerscope.errors import CapabilityError, ConfigError, ModelError, SiteError
from support.loaded import batch_of
from support.mlx_models import folder, in_hugging_face, in_mlx, mlx
from support.tiny_models import tiny, tiny_tokenizer


def load(path, **options):
    mlx()
    return layerscope.load(path, backend="mlx", **options)


def changed(tmp_path, family, **fields):
    path = tmp_path / family
    shutil.copytree(folder(family), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return path


def test_a_missing_extra_names_the_pip_line(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "layerscope.models.backends.mlx.find_spec",
        lambda name: None if name == "mlx_lm" else real(name),
    )
    with pytest.raises(ModelError, match=r"needs mlx_lm.*pip install 'layerscope\[mlx\]'"):
        layerscope.load(folder("llama"), backend="mlx")


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_a_dtype_that_is_asked_for_is_what_runs(dtype):
    model = load(folder("llama"), dtype=dtype)
    assert model.dtype == getattr(torch, dtype) and not model.identities.failures
    result = model.run(batch_of(), capture=["resid_post.1", "attn.1.pattern"])
    assert {value.dtype for value in result.activations.values()} == {model.dtype}
    ones = torch.ones(32, dtype=torch.float64)
    edit = layerscope.models.Add("resid_post.1", ones, coefficient=0.0)
    edited = model.run(batch_of(), edits=[edit], capture="resid_post.2")
    assert edited["resid_post.2"].dtype == model.dtype
    assert torch.equal(edited.logits, result.logits)
    wide = in_mlx("llama").run(batch_of()).logits[batch_of().attention_mask]
    narrow = result.logits[batch_of().attention_mask].float()
    assert float((narrow - wide).norm() / wide.norm()) < (2e-2 if dtype == "bfloat16" else 3e-3)


def test_weights_stored_in_bfloat16_run_in_float32_on_a_cpu(tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, hf = load(tmp_path), layerscope.load(tmp_path)
    assert model.dtype == torch.float32
    assert model.provenance()["dtype_reason"] == "default on a CPU"
    logits = model.run(batch_of(0)).logits
    torch.testing.assert_close(logits, hf.run(batch_of(0)).logits, rtol=1e-4, atol=1e-4)


def test_the_rotary_base_of_todays_config_files_is_heard(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 20.0}
    path = changed(tmp_path, "llama", rope_parameters=rope)
    expected = layerscope.load(path).run(batch_of(0)).logits
    torch.testing.assert_close(load(path).run(batch_of(0)).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(in_mlx("llama").run(batch_of(0)).logits, expected, atol=1e-2)


def test_scaled_rotary_embeddings_are_those_of_hugging_face(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    path = changed(tmp_path, "llama", rope_parameters=rope)
    expected = layerscope.load(path).run(batch_of(0), capture="attn.2.pattern")
    found = load(path).run(batch_of(0), capture="attn.2.pattern")
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found["attn.2.pattern"], expected["attn.2.pattern"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    (
        ("llama", {"hidden_act": "relu"}, "takes no notice of hidden_act=relu"),
        ("gemma3", {"final_logit_softcapping": 5.0}, "no notice of final_logit_softcapping=5.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "gemma3",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "blocks alternate otherwise",
        ),
    ),
)
def test_a_configuration_that_mlx_lm_would_not_follow_is_refused(tmp_path, family, fields, message):
    with pytest.raises(ModelError, match=message):
        load(changed(tmp_path, family, **fields))


def test_what_mlx_lm_computes_otherwise_is_said(tmp_path):
    with pytest.warns(UserWarning, match="gelu_tanh where the configuration says gelu:"):
        model = load(changed(tmp_path, "gpt_neox", hidden_act="gelu"))
    assert "gelu_tanh" in model.provenance()["differs_from_huggingface"][0]
    assert in_mlx("llama").provenance()["differs_from_huggingface"] == []


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    mlx()
    with pytest.raises(ModelError, match="loads folders and hub ids, not a LlamaForCausalLM"):
        load(tiny("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match="chooses its own device"):
        load(folder("llama"), device="cuda")
    with pytest.raises(ConfigError, match="no model in float64"):
        load(folder("llama"), dtype="float64")
    for family, message in (
        ("persimmon", "Model type persimmon not supported"),
        ("deepseek_v3", "do not all have attention with 4 heads"),
    ):
        other = tmp_path / family
        tiny(family).save_pretrained(other)
        tiny_tokenizer().save_pretrained(other)
        with pytest.raises(ModelError, match=rf"{message}.*'huggingface'"):
            load(other)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"config.json|GGUF"):
        load(gguf)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(folder("llama") / "config.json", adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="only an adapter"):
        load(adapter)
    with pytest.raises(ModelError, match=r"cannot load .*parameters.*'huggingface'"):
        untied = tmp_path / "untied"
        tiny("gpt2_untied", n_inner=None).save_pretrained(untied)
        tiny_tokenizer().save_pretrained(untied)
        load(untied)


def test_sites_that_do_not_exist_say_what_does():
    model = in_mlx("llama")
    with pytest.raises(SiteError, match=r"head 4 .*heads 0 to 3"):
        model.run(batch_of(0), capture="attn.0.head.4.z")
    with pytest.raises(SiteError, match="kv_head 2"):
        model.run(batch_of(0), capture="attn.0.kv_head.2.k")
    with pytest.raises(CapabilityError, match=r"its own keys and values; use attn.0.head.1.k"):
        in_mlx("gpt2").run(batch_of(0), capture="attn.0.kv_head.1.k")
    with pytest.raises(CapabilityError, match="in one projection"):
        in_mlx("gpt2").run(batch_of(0), capture="attn.0.q_pre")
    with pytest.raises(CapabilityError, match="several query heads share it"):
        model.run(batch_of(0), edits=[layerscope.models.ZeroAblate("attn.0.head.1.k")])
    with pytest.raises(CapabilityError, match="in parallel"):
        in_mlx("gpt_neox").run(batch_of(0), capture="resid_mid.0")


def test_what_is_recorded_is_what_was_loaded():
    model, hf = in_mlx("llama"), in_hugging_face("llama")
    found, expected = model.provenance(), hf.provenance()
    assert found["backend"] == "mlx" and found["verified"]
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["tokenizer_sha256"] == expected["tokenizer_sha256"]
    assert {"mlx", "mlx-lm"} <= set(found["versions"])
