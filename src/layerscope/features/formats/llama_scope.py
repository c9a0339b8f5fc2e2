"""F4: Llama Scope, version 1. ``hyperparams.json`` and ``checkpoints/final.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate, JumpRelu, Relu, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    Units,
    first_file,
    folders_with,
    layer_in,
    matrix,
    read_json,
    site_of,
    vector,
    vector_or_zeros,
)
from layerscope.features.tensors import TensorFile, open_tensors
from layerscope.features.token_norms import TokenNorm

CONFIG = "hyperparams.json"
WEIGHTS = (
    "sae_weights.safetensors",
    "sae_weights.pt",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)


class LlamaScope(Format):
    """Llama Scope as its own code runs it.

    The dataset's norms are folded first, then the decoder is brought to unit norm (where sparsity
    was counted with it), and the one threshold is compared with what results, on raw activations.
    """

    code, name = "F4", "llama_scope"
    title = "Llama Scope v1 (hyperparams.json)"
    patterns = ("*hyperparams.json", "*checkpoints/*", "*sae_weights.*")

    def find(self, root: Path) -> list[Found]:
        """Return the folders with a hyperparams.json."""
        return [
            Found(self.code, folder, _layer(folder), folder.name)
            for folder in folders_with(root, CONFIG)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        config = read_json(found.path / CONFIG)
        path = first_file(found.path, WEIGHTS)
        if path is None:
            raise DictionaryError(f"{found.path} has no weights; looked for {', '.join(WEIGHTS)}")
        file = open_tensors(path)
        by_norm = bool(config.get("sparsity_include_decoder_norm"))
        n = file.entry(key(file, "encoder.bias")).shape[0]
        return read_open_moss(
            self.name,
            config,
            file,
            options,
            gate=_gate(config, n, options, found.path),
            gate_is_final=True,
            units="unit" if by_norm else "raw",
        )


def read_open_moss(
    name: str,
    config: Mapping[str, Any],
    file: TensorFile,
    options: LoadOptions,
    *,
    gate: Gate,
    gate_is_final: bool,
    units: Units,
) -> Raw:
    """Return a dictionary stored as encoder and decoder modules with OpenMOSS hyperparameters."""
    if any("glu" in tensor for tensor in file.names()):
        raise DictionaryError(
            f"{file.path} has a GLU encoder, whose features read no single direction; it cannot be "
            "used here"
        )
    hook_in = config.get("hook_point_in") or options.hook
    reads = site_of(hook_in, file.path)
    writes = site_of(config.get("hook_point_out") or hook_in, file.path)
    encoder = matrix(file, key(file, "encoder.weight"), options, features_first=True)
    decoder = matrix(file, key(file, "decoder.weight"), options, features_first=False)
    s_in, s_out, token_norm = scales(config, options, encoder.shape[1], decoder.shape[1], file.path)
    return Raw(
        format=name,
        reads=reads,
        writes=(writes,),
        encoder=encoder,
        decoders=(decoder,),
        b_enc=vector(file, options, key(file, "encoder.bias")),
        b_dec=vector_or_zeros(file, options, key(file, "decoder.bias"), decoder.shape[1]),
        gate=gate,
        pre_bias=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        input_scale=s_in,
        output_scale=s_out,
        units=units,
        gate_is_final=gate_is_final,
        token_norm=token_norm,
        facts={
            "architecture": str(config.get("act_fn", "jumprelu")),
            "k": config.get("top_k"),
            "expected_l0": config.get("top_k"),
            "model_name": config.get("model_name"),
        },
    )


def scales(
    config: Mapping[str, Any], options: LoadOptions, d_in: int, d_out: int, path: Path
) -> tuple[float, float, TokenNorm | None]:
    """Return the scales in and out, and the norm per token.

    Raises:
        DictionaryError: activations were scaled by a dataset's norm that is not stored.
    """
    kind = config.get("norm_activation") or "inference"
    if kind == "token-wise":
        return 1.0, 1.0, TokenNorm("constant_norm_rescale")
    if kind in ("inference", "none"):
        return 1.0, 1.0, None
    if kind != "dataset-wise":
        raise DictionaryError(f"{path}: norm_activation '{kind}' depends on the batch; unsupported")
    norms = cast("dict[str, float]", config.get("dataset_average_activation_norm") or {})
    if "in" not in norms:
        if options.activation_scale is None:
            raise DictionaryError(
                f"{path} was trained on activations scaled by a dataset's norm that it does not "
                "store; give activation_scale = sqrt(d) / (mean norm of its site)"
            )
        return options.activation_scale, options.activation_scale, None
    if options.activation_scale is not None:
        raise DictionaryError(f"{path} stores its activation scale; a second one would be wrong")
    return sqrt(d_in) / norms["in"], sqrt(d_out) / norms.get("out", norms["in"]), None


def key(file: TensorFile, name: str) -> str:
    """Return a tensor's name, inside the ``sae`` that torch files wrap it in."""
    return f"sae.{name}" if f"sae.{name}" in file else name


def _gate(config: Mapping[str, Any], n: int, options: LoadOptions, path: Path) -> Gate:
    kind = str(config.get("act_fn", "jumprelu")).lower()
    threshold = float(config.get("jump_relu_threshold") or 0.0)
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):
        values: Tensor = torch.full((n,), threshold, device=options.device)
        trained = ", trained as topk" if kind == "topk" else ""
        return JumpRelu(values, words=f"{threshold:.4g} on raw activations{trained}")
    if kind == "topk":
        k = options.k or config.get("top_k")
        if not isinstance(k, int):
            raise DictionaryError(f"{path} is a TopK dictionary without top_k; give k")
        return TopK(k)
    if kind == "relu":
        return Relu()
    raise DictionaryError(f"{path}: unknown act_fn '{kind}'; known: jumprelu, topk, relu")


def _layer(folder: Path) -> int | None:
    try:
        hook = read_json(folder / CONFIG).get("hook_point_in")
    except DictionaryError:
        hook = None
    found = layer_in(str(hook)) if hook else None
    return layer_in(folder.name) if found is None else found
