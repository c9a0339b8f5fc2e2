"""F9: circuit-tracer. Transcoders of every layer, or a cross-layer transcoder in two files each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate, JumpRelu, Relu, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    first_file,
    matrix,
    read_yaml,
    site_of,
    vector,
    vector_or_zeros,
)
from layerscope.features.tensors import TensorFile, open_tensors
from layerscope.models.sites import Site

CONFIGS = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")
_SINGLE = re.compile(r"layer_(\d+)\.safetensors")
_CROSS = re.compile(r"W_enc_(\d+)\.safetensors")


class CircuitTracer(Format):
    """Encoders are [n, d]; one active feature's decoders of a CLT are one piece of the file."""

    code, name = "F9", "circuit_tracer"
    title = "circuit-tracer (layer_i.safetensors, W_enc_i.safetensors)"
    patterns = ("*config.yaml", "*layer_*.safetensors", "*W_*.safetensors")

    def find(self, root: Path) -> list[Found]:
        """Return every layer's file."""
        paths = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
        found: list[Found] = []
        for path in paths:
            match = _SINGLE.fullmatch(path.name) or _CROSS.fullmatch(path.name)
            if match:
                found.append(Found(self.code, path, int(match[1]), path.name))
        config = first_file(root, CONFIGS) if root.is_dir() else None
        if not found and config is not None and read_yaml(config).get("transcoders"):
            raise DictionaryError(
                f"{config} only lists transcoders that lie elsewhere; open those repositories"
            )
        return found

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a layer; raises DictionaryError."""
        config = _config(found.path)
        if _CROSS.fullmatch(found.path.name):
            return self._cross_layer(found, config, options)
        file = open_tensors(found.path)
        layer = found.layer or 0
        encoder = matrix(file, "W_enc", options, features_first=True)
        decoder = matrix(file, "W_dec", options, features_first=True)
        return Raw(
            format=self.name,
            reads=_site(config, "feature_input_hook", "mlp.hook_in", found, layer),
            writes=(_site(config, "feature_output_hook", "hook_mlp_out", found, layer),),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=vector_or_zeros(file, options, "b_enc", encoder.shape[0]),
            b_dec=vector_or_zeros(file, options, "b_dec", decoder.shape[1]),
            gate=_gate(config, file, options, "activation_function.threshold"),
            skip=vector(file, options, "W_skip") if "W_skip" in file else None,
            facts=_facts(config),
        )

    def _cross_layer(self, found: Found, config: Mapping[str, Any], options: LoadOptions) -> Raw:
        layer = found.layer or 0
        file = open_tensors(found.path)
        second = open_tensors(found.path.with_name(f"W_dec_{layer}.safetensors"))
        name = f"W_dec_{layer}"
        shape = second.entry(name).shape
        if len(shape) != 3:
            raise DictionaryError(f"{second.path}: '{name}' has {len(shape)} axes; it needs three")
        n_layers = layer + shape[1]
        encoder = matrix(file, f"W_enc_{layer}", options, features_first=True)
        skip = None
        if f"W_skip_{layer}" in file:
            # Applied as x W here, unlike in a single layer's file.
            skip = vector(file, options, f"W_skip_{layer}").T.contiguous()
        return Raw(
            format=self.name,
            reads=_site(config, "feature_input_hook", "hook_resid_mid", found, layer),
            writes=tuple(
                _site(config, "feature_output_hook", "hook_mlp_out", found, target)
                for target in range(layer, n_layers)
            ),
            encoder=encoder,
            decoders=tuple(
                matrix(second, name, options, features_first=True, part=_slot(slot))
                for slot in range(shape[1])
            ),
            b_enc=vector_or_zeros(file, options, f"b_enc_{layer}", encoder.shape[0]),
            b_dec=vector_or_zeros(file, options, f"b_dec_{layer}", shape[2]),
            gate=_gate(config, file, options, f"threshold_{layer}"),
            skip=skip,
            facts=_facts(config),
        )


def _slot(slot: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values[:, slot]


def _site(config: Mapping[str, Any], key: str, default: str, found: Found, layer: int) -> Site:
    return site_of(str(config.get(key) or default), found.path, layer=layer)


def _gate(
    config: Mapping[str, Any], file: TensorFile, options: LoadOptions, threshold: str
) -> Gate:
    if threshold in file:
        values = vector(file, options, threshold)
        n = next(entry.shape[0] for name, entry in file.entries.items() if name.startswith("b_enc"))
        return JumpRelu(values.expand(n).contiguous())
    kind = str(config.get("activation") or "relu").lower()
    if "topk" in kind:
        k = options.k or config.get("k")
        if not isinstance(k, int):
            raise DictionaryError(f"{file.path}: a topk activation needs k; give k")
        return TopK(k)
    if "jump" in kind:
        raise DictionaryError(f"{file.path} is a JumpReLU transcoder, but stores no '{threshold}'")
    return Relu()


def _config(path: Path) -> dict[str, Any]:
    config = first_file(path.parent, CONFIGS)
    if config is None:
        return {}
    found = read_yaml(config)
    # Weights & Biases wraps every value.
    return {
        key: value["value"] if isinstance(value, dict) and "value" in value else value
        for key, value in found.items()
    }


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": str(config.get("model_kind") or "transcoder_set"),
        "model_name": config.get("model_name"),
        "k": config.get("k"),
    }
