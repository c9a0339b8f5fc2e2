"""F1: SAELens. ``cfg.json`` and ``sae_weights.safetensors``, version 6 and before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from layerscope.errors import DictionaryError, nearest
from layerscope.features.architectures import Gate, Gated, JumpRelu, Relu, TopK
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

CONFIG = "cfg.json"
WEIGHTS = ("sae_weights.safetensors", "sparse_autoencoder_final.safetensors")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_ARCHITECTURES = (
    "standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip


class SaeLens(Format):
    """SAELens folders; also what layerscope writes itself."""

    code, name = "F1", "saelens"
    title = "SAELens (cfg.json, sae_weights.safetensors)"
    patterns = ("*cfg.json", "*sae_weights.safetensors", "*sparsity.safetensors")

    def find(self, root: Path) -> list[Found]:
        """Return the folders with a cfg.json and SAELens weights."""
        folders = [f for f in folders_with(root, CONFIG) if first_file(f, WEIGHTS)]
        return [Found(self.code, folder, _layer(folder), folder.name) for folder in folders]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        config = modern(read_json(found.path / CONFIG), found.path)
        path = first_file(found.path, WEIGHTS)
        assert path is not None
        file = open_tensors(path)
        encoder = matrix(file, "W_enc", options, features_first=False)
        decoder = matrix(file, "W_dec", options, features_first=True)
        n = encoder.shape[0]
        if decoder.shape[0] != n:
            raise DictionaryError(
                f"{path}: W_enc has {n} features, W_dec {decoder.shape[0]}; W_dec is [features, d]"
            )
        architecture = str(config["architecture"])
        transcoder = "transcoder" in architecture
        gate, b_enc = _gate(architecture, config, file, options, n)
        scale, token_norm, folded = _norm(config, options, found.path)
        metadata = config["metadata"]
        hook = options.hook or metadata.get("hook_name")
        reads = site_of(hook, found.path)
        writes = (reads,)
        if transcoder:
            hook_out = options.hook_out or metadata.get("hook_name_out")
            writes = (site_of(hook_out, found.path),)
        rescaled = architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm"))
        units: Units = "norm" if rescaled else "stored"
        if "scaling_factor" in file:
            decoder = decoder.scaled(vector(file, options, "scaling_factor"))
        return Raw(
            format=self.name,
            reads=reads,
            writes=writes,
            encoder=encoder,
            decoders=(decoder,),
            b_enc=b_enc,
            b_dec=vector_or_zeros(file, options, "b_dec", decoder.shape[1]),
            gate=gate,
            pre_bias=bool(config["apply_b_dec_to_input"]) and not transcoder,
            input_scale=scale,
            output_scale=scale,
            units=units,
            rank_by_norm=rescaled,
            token_norm=token_norm,
            skip=vector(file, options, "W_skip") if "W_skip" in file else None,
            norm_words="folded before it was stored" if folded else "",
            facts={
                "architecture": architecture,
                "model_name": metadata.get("model_name"),
                "k": config.get("k"),
                "expected_l0": config.get("k") or _stored(metadata, "l0"),
                "expected_fvu": _stored(metadata, "fvu"),
                "prepend_bos": metadata.get("prepend_bos"),
                "context_size": metadata.get("context_size"),
                "skip": _stored(metadata, "skip"),
            },
            folded=folded,
        )


def modern(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a configuration in the shape of version 6, whatever its age.

    Raises:
        DictionaryError: the architecture is not one that layerscope knows.
    """
    found = {_RENAMED.get(key, key): value for key, value in config.items()}
    metadata: dict[str, Any] = dict(cast("dict[str, Any]", found.get("metadata") or {}))
    for key in ("model_name", "hook_name", "hook_head_index", "hook_name_out", "context_size",
                "prepend_bos"):  # fmt: skip
        if key in found:
            metadata.setdefault(key, found[key])
    kwargs = cast("dict[str, Any]", found.get("activation_fn_kwargs") or {})
    architecture = found.get("architecture", "standard")
    if found.get("activation_fn") == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
        found.setdefault("k", kwargs.get("k"))
    if architecture not in _ARCHITECTURES:
        raise DictionaryError(
            f"{path}: unknown architecture '{architecture}'"
            f"{nearest(str(architecture), _ARCHITECTURES)}; known: {', '.join(_ARCHITECTURES)}"
        )
    norm = found.get("normalize_activations", "none")
    if isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    found |= {
        "architecture": architecture,
        "normalize_activations": norm or "none",
        "metadata": metadata,
        "apply_b_dec_to_input": found.get("apply_b_dec_to_input", True),
    }
    return found


def _gate(
    architecture: str, config: Mapping[str, Any], file: TensorFile, options: LoadOptions, n: int
) -> tuple[Gate, Tensor]:
    """Return the gate and the bias that goes with its pre-activations."""
    if architecture == "gated":
        b_gate = vector(file, options, "b_gate")
        gated = Gated.of(vector(file, options, "r_mag"), b_gate, vector(file, options, "b_mag"))
        return gated, b_gate
    b_enc = vector_or_zeros(file, options, "b_enc", n)
    if architecture.startswith("jumprelu"):
        threshold = vector(file, options, "threshold")
        same = bool((threshold == threshold[0]).all())
        words = f"{float(threshold[0]):.4g} (one for all)" if same else "per feature"
        return JumpRelu(threshold, words=words), b_enc
    if architecture == "topk":
        k = options.k or config.get("k")
        if not isinstance(k, int):
            raise DictionaryError(
                f"{file.path} is a TopK dictionary that does not say its k; give k"
            )
        return TopK(k), b_enc
    return Relu(), b_enc


def _norm(
    config: Mapping[str, Any], options: LoadOptions, path: Path
) -> tuple[float, TokenNorm | None, bool]:
    """Return the scale, the norm per token, and whether the scale was folded before."""
    norm = config["normalize_activations"]
    ours = cast("dict[str, Any]", config["metadata"].get("layerscope") or {})
    folded = bool(ours.get("folded"))
    scale = options.activation_scale
    if norm == "expected_average_only_in":
        if scale is None:
            raise DictionaryError(
                f"{path} was trained on activations scaled to an average norm of sqrt(d), and does "
                "not store the scale: give activation_scale = sqrt(d) / (mean norm of its site)"
            )
        return scale, None, folded
    if scale is not None:
        raise DictionaryError(
            f"{path} needs no activation scale (normalize_activations is '{norm}'"
            f"{', folded before it was stored' if folded else ''}): folding one would be the "
            "second time"
        )
    if norm in ("layer_norm", "constant_norm_rescale"):
        return 1.0, TokenNorm(norm), folded
    if norm != "none":
        raise DictionaryError(f"{path}: unknown normalize_activations '{norm}'")
    return 1.0, None, folded


def _stored(metadata: Mapping[str, Any], name: str) -> float | None:
    found = cast("dict[str, Any]", metadata.get("layerscope") or {}).get(name)
    return float(found) if isinstance(found, int | float) else None


def _layer(folder: Path) -> int | None:
    """Return the layer by the hook in the header, else by the folder's name."""
    try:
        config = read_json(folder / CONFIG)
    except DictionaryError:
        return layer_in(folder.name)
    metadata = cast("dict[str, Any]", config.get("metadata") or {})
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    return layer_in(str(hook)) if hook else layer_in(folder.name)
