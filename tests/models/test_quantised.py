"""Quantised models are recognised, need what they need, and refuse what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

import layerscope
from layerscope.errors import CapabilityError, ModelError
from layerscope.models.backends.base import Capability
from layerscope.models.backends.huggingface import quantised
from layerscope.models.backends.huggingface.loading import load_pretrained
from layerscope.models.backends.huggingface.lookup import find_sizes
from layerscope.models.backends.huggingface.quantised import (
    ASKED,
    SCHEMES,
    capabilities_lost,
    disallows,
    scheme_of,
    scheme_of_model,
)
from support.tiny_models import tiny, tiny_tokenizer


def marked(config: dict[str, Any]) -> PreTrainedModel:
    """A model that says it is quantised; its weights are ordinary ones."""
    model: Any = tiny("llama")
    model.config.quantization_config = config
    model.hf_quantizer = object()
    return model


def folder_with(path: Path, config: dict[str, Any], **sizes: Any) -> Path:
    tiny("llama", **sizes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    return path


@pytest.mark.parametrize(
    ("config", "name", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit", 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes-8bit", 8),
        ({"load_in_8bit": True}, "bitsandbytes-8bit", 8),
        ({"quant_method": "gptq", "bits": 3}, "gptq", 3),
        ({"quant_method": "awq", "bits": 4}, "awq", 4),
        ({"quant_method": "awq", "w_bit": 4}, "awq", 4),
        ({"quant_method": "mxfp4"}, "mxfp4", 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({"quant_method": "vptq"}, "vptq", None),
    ],
)
def test_schemes_are_recognised(config: dict[str, Any], name: str, bits: int | None) -> None:
    scheme = scheme_of({"quantization_config": config})
    assert scheme is not None
    assert scheme.to_dict() == {"scheme": name, "bits": bits}


def test_configurations_of_transformers_are_read_too() -> None:
    scheme = scheme_of_model(marked(BitsAndBytesConfig(load_in_4bit=True)))  # type: ignore[arg-type]
    assert scheme is SCHEMES["bitsandbytes-4bit"]


def test_an_ordinary_model_is_none_and_loses_nothing() -> None:
    model = tiny("llama")
    assert scheme_of(model.config) is None and scheme_of_model(model) is None
    assert disallows(None, "gradients") is None
    assert capabilities_lost(model) == {}


def test_a_model_that_was_unpacked_on_loading_is_ordinary() -> None:
    model: Any = tiny("llama")
    model.hf_quantizer = object()  # transformers removes the configuration when it unpacks
    assert scheme_of_model(model) is None


class TestTable:
    def test_no_scheme_gives_gradients(self) -> None:
        for name, scheme in SCHEMES.items():
            reason = disallows(scheme, "gradients")
            assert reason is not None and name in reason
            assert "\n" not in reason

    def test_every_row_speaks_of_what_may_be_asked(self) -> None:
        assert {what for scheme in SCHEMES.values() for what in scheme.lost} <= set(ASKED)

    def test_an_unknown_scheme_loses_whatever_any_loses(self) -> None:
        unknown = scheme_of({"quantization_config": {"quant_method": "new"}})
        assert unknown is not None
        assert set(unknown.lost) == {what for row in SCHEMES.values() for what in row.lost}

    def test_an_unknown_question_is_a_mistake(self) -> None:
        with pytest.raises(KeyError):
            disallows(SCHEMES["fp8"], "gradient")

    def test_capabilities(self) -> None:
        lost = capabilities_lost(marked({"quant_method": "gptq", "bits": 4}))
        assert set(lost) == {Capability.GRADIENTS} and "gptq" in lost[Capability.GRADIENTS]


class TestBuilt:
    def test_it_gives_no_gradients(self) -> None:
        model = layerscope.load(marked({"load_in_4bit": True}), tokenizer=tiny_tokenizer())
        model.run("One two three")
        with pytest.raises(CapabilityError, match="gradients"):
            model.run("One two three", gradients=True)

    def test_it_is_not_cast(self) -> None:
        model = marked({"load_in_4bit": True})
        with pytest.raises(CapabilityError, match="cannot be cast"):
            load_pretrained(model, tokenizer=tiny_tokenizer(), dtype="bf16")
        loaded = load_pretrained(model, tokenizer=tiny_tokenizer(), device="cpu")
        assert loaded.provenance()["quantisation"] == {
            "scheme": "bitsandbytes-4bit",
            "bits": 4,
            "unpacked": False,
        }

    def test_repacked_weights_have_no_hash(self) -> None:
        loaded = load_pretrained(marked({"quant_method": "awq"}), tokenizer=tiny_tokenizer())
        with pytest.raises(CapabilityError, match="load it by folder"):
            _ = loaded.weights_hash

    def test_a_packed_head_is_refused(self) -> None:
        model: Any = marked({"load_in_8bit": True})
        packed = torch.zeros(384, 32, dtype=torch.int8)
        model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ModelError, match=r"unembedding .* packed as int8"):
            load_pretrained(model, tokenizer=tiny_tokenizer())


class TestFolder:
    @pytest.mark.parametrize(
        ("config", "line"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "accelerate bitsandbytes"),
            ({"quant_method": "gptq", "bits": 4}, "accelerate optimum gptqmodel"),
            ({"quant_method": "awq", "bits": 4}, "accelerate gptqmodel"),
            ({"quant_method": "mxfp4"}, "accelerate"),
        ],
    )
    def test_a_missing_package_is_named_before_the_load(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        config: dict[str, Any],
        line: str,
    ) -> None:
        monkeypatch.setattr(quantised, "missing", list)
        with pytest.raises(ModelError, match=f"pip install {line}$"):
            load_pretrained(folder_with(tmp_path, config), device="cpu")

    def test_sizes_of_packed_files(self, tmp_path: Path) -> None:
        path = folder_with(tmp_path, {"quant_method": "gptq", "bits": 4})
        sizes = find_sizes(str(path))
        stored = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
        assert (sizes.scheme, sizes.packed_bytes) == ("gptq", stored)
        assert sizes.parameters == sum(tensor.numel() for tensor in tiny("llama").parameters())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_fp8_is_unpacked_on_a_cpu(self, tmp_path: Path, dtype: str) -> None:
        pytest.importorskip("accelerate", reason="fp8 needs accelerate: pip install accelerate")
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        path = folder_with(tmp_path, config, **shape)
        weights = load_file(path / "model.safetensors")
        for name, values in list(weights.items()):
            if values.ndim == 2 and "proj" in name:
                rows, columns = values.shape
                scale = values.abs().max() / 448
                weights[name] = (values / scale).to(torch.float8_e4m3fn)
                blocks = (-(-rows // 128), -(-columns // 128))
                weights[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        model = layerscope.load(path, device="cpu", dtype=dtype)
        assert model.identities is not None and model.identities.passed
        provenance = model.provenance()
        assert provenance["quantisation"] == {"scheme": "fp8", "bits": 8, "unpacked": True}
        state = model.backend.model.state_dict()  # type: ignore[attr-defined]
        assert {str(tensor.dtype) for tensor in state.values()} == {f"torch.{dtype}"}
        exact = tiny("llama", **shape).state_dict()["model.layers.1.mlp.up_proj.weight"]
        found = state["model.layers.1.mlp.up_proj.weight"].float()
        assert (found - exact).abs().max() < 0.07 * exact.abs().max()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes(self, tmp_path: Path, bits: int) -> None:
        for package in ("accelerate", "bitsandbytes"):
            pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
        from transformers import AutoModelForCausalLM

        tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "plain")
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=config, device_map={"": "cpu"}
        )
        packed.save_pretrained(tmp_path / "packed")
        tiny_tokenizer().save_pretrained(tmp_path / "packed")
        model = layerscope.load(tmp_path / "packed", device="cpu")
        assert model.identities is not None and model.identities.passed
        assert model.provenance()["quantisation"]["bits"] == bits
        with pytest.raises(CapabilityError, match="gradients"):
            model.run("One two three", gradients=True)
