"""F7: sparsify. A folder per hook point with ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate, GroupMax, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    folders_with,
    layer_in,
    matrix,
    read_json,
    vector,
)
from layerscope.features.tensors import open_tensors
from layerscope.models.sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
# What a hook point names is a module: an autoencoder reads its output, a transcoder its input too.
_MODULES = (
    (r"(?:.*\.)?(?:layers|h)\.(\d+)", "resid_pre", "resid_post"),
    (r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp", "mlp_in", "mlp_out"),
    (r"(?:.*\.)?(?:layers|h)\.(\d+)\.(?:self_attn|attn|attention)", "attn_in", "attn_out"),
)


class Sparsify(Format):
    """TopK and group-max dictionaries and (skip) transcoders; W_dec is [n, d_out]."""

    code, name = "F7", "sparsify"
    title = "sparsify (cfg.json, sae.safetensors)"
    patterns = ("*cfg.json", "*config.json", "*sae.safetensors")

    def find(self, root: Path) -> list[Found]:
        """Return the folders with a cfg.json and sae.safetensors."""
        return [
            Found(self.code, folder, layer_in(folder.name), folder.name)
            for folder in folders_with(root, CONFIG, WEIGHTS)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        config = read_json(found.path / CONFIG)
        file = open_tensors(found.path / WEIGHTS)
        if config.get("signed"):
            raise DictionaryError(f"{found.path} has signed features, which are not supported")
        transcode = bool(config.get("transcode"))
        reads, writes = _sites(found, options, transcode=transcode)
        encoder = matrix(file, "encoder.weight", options, features_first=True)
        decoder = matrix(file, "W_dec", options, features_first=True)
        expected = int(config.get("num_latents") or 0) or encoder.shape[0]
        if not encoder.shape[0] == decoder.shape[0] == expected:
            raise DictionaryError(
                f"{found.path}: the encoder has {encoder.shape[0]} features, W_dec has "
                f"{decoder.shape[0]}, the configuration says {expected}"
            )
        k = options.k or config.get("k")
        if not isinstance(k, int):
            raise DictionaryError(f"{found.path / CONFIG} does not say k; give k")
        grouped = config.get("activation") == "groupmax"
        gate: Gate = GroupMax(k) if grouped else TopK(k)
        return Raw(
            format=self.name,
            reads=reads,
            writes=(writes,),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=vector(file, options, "encoder.bias"),
            b_dec=vector(file, options, "b_dec"),
            gate=gate,
            pre_bias=not transcode,
            skip=vector(file, options, "W_skip") if "W_skip" in file else None,
            facts={"architecture": "groupmax" if grouped else "topk", "k": k, "expected_l0": k},
        )


def _sites(found: Found, options: LoadOptions, *, transcode: bool) -> tuple[Site, Site]:
    name = found.path.name
    if name == "embed_tokens":
        return Site("embed"), Site("embed")
    for pattern, module_in, module_out in _MODULES:
        match = re.fullmatch(pattern, name)
        if match:
            layer = int(match[1])
            return Site(module_in if transcode else module_out, layer), Site(module_out, layer)
    if options.hook is None:
        raise DictionaryError(f"{found.path}: '{name}' is no hook point that is known; give hook")
    site = Site("resid_post", found.layer or 0)
    return site, site
