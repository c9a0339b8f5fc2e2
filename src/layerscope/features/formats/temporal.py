"""F13: temporal dictionaries. ``conf.yaml`` and ``latest_ckpt.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate, Relu, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    folders_with,
    layer_in,
    matrix,
    read_yaml,
    site_of,
    vector,
    vector_or_zeros,
)
from layerscope.features.temporal import TemporalDictionary, read_attention
from layerscope.features.tensors import open_tensors
from layerscope.models.sites import Site

CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"


class TemporalSae(Format):
    """Codes of what attention over the context does not predict; encoder rows times 1 / (4 d)."""

    code, name = "F13", "temporal"
    title = "Temporal SAE (conf.yaml, latest_ckpt.safetensors)"
    patterns = ("*conf.yaml", "*latest_ckpt.safetensors")

    def find(self, root: Path) -> list[Found]:
        """Return the folders with a conf.yaml and a checkpoint."""
        return [
            Found(self.code, folder, _layer(folder), folder.name)
            for folder in folders_with(root, CONFIG, WEIGHTS)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        config = cast("dict[str, Any]", read_yaml(found.path / CONFIG).get("sae") or {})
        file = open_tensors(found.path / WEIGHTS)
        decoder = matrix(file, "D", options, features_first=True)
        n, d = decoder.shape
        tied = bool(config.get("tied_weights", True)) or "E" not in file
        name = "D" if tied else "E"
        first = file.entry(name).shape[0] == n  # square: [n, d], as it is documented
        encoder = matrix(file, name, options, features_first=first, times=1 / (4 * d))
        scale = options.activation_scale or float(config.get("scaling_factor") or 1.0)
        k = options.k or config.get("kval_topk")
        gate: Gate = Relu()
        if str(config.get("sae_diff_type") or "topk") == "topk" and k is not None:
            gate = TopK(int(k))
        tensors = {
            each: vector(file, options, each)
            for each in file.names()
            if each.startswith("attn_layers.")
        }
        n_heads = int(config.get("n_heads") or 8)
        layers = [
            read_attention(tensors, layer, n_heads, file.path)
            for layer in range(int(config.get("n_attn_layers") or 0))
        ]
        if n_heads < 1 or any(len(layer.value[0]) % n_heads for layer in layers):
            raise DictionaryError(f"{found.path}: {n_heads} heads do not divide the codes")
        if found.layer is not None:
            site = Site("resid_post", found.layer)
        else:
            site = site_of(options.hook, found.path)
        return Raw(
            format=self.name,
            reads=site,
            writes=(site,),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=torch.zeros(n, device=options.device),
            b_dec=vector_or_zeros(file, options, "b", d),
            gate=gate,
            input_scale=scale,
            output_scale=scale,
            notes=(f"novel codes after {len(layers)} attention layers",),
            facts={"architecture": "temporal", "k": k, "expected_l0": k},
            finish=lambda made: TemporalDictionary.of(made, layers, scale),
        )


def _layer(folder: Path) -> int | None:
    for part in reversed(folder.parts):
        layer = layer_in(part)
        if layer is not None:
            return layer
    return None
