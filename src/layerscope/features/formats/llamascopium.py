"""F6: Llamascopium, version 2. ``config.json`` with ``sae_type``: dictionaries and cross-layer."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import BatchTopK, Gate, JumpRelu, Relu, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
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

CONFIG = "config.json"
WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."


class Llamascopium(Format):
    """The successor of Llama Scope's library; features are kept in raw units."""

    code, name = "F6", "llamascopium"
    title = "Llamascopium v2 (config.json with sae_type)"
    patterns = ("*config.json", "*sae_weights.*")

    def find(self, root: Path) -> list[Found]:
        """Return dictionaries, and every layer of cross-layer transcoders."""
        found: list[Found] = []
        for folder in folders_with(root, CONFIG):
            config = read_json(folder / CONFIG)
            if "sae_type" not in config:
                continue
            if config["sae_type"] == "clt":
                hooks = cast("list[str]", config.get("hook_points_in") or [])
                found += [
                    Found(self.code, folder, layer, f"{folder.name} layer {layer}")
                    for layer in range(len(hooks))
                ]
            else:
                hook = config.get("hook_point_in") or folder.name
                found.append(Found(self.code, folder, layer_in(str(hook)), folder.name))
        return found

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        config = read_json(found.path / CONFIG)
        kind = config["sae_type"]
        path = first_file(found.path, WEIGHTS)
        if path is None:
            dcp = (found.path / "sae_weights.dcp").exists()
            raise DictionaryError(
                f"{found.path} has no sae_weights.safetensors"
                + (": convert the distributed checkpoint with its own library" if dcp else "")
            )
        file = open_tensors(path)
        if kind == "clt":
            return self._cross_layer(found, config, file, options)
        if kind != "sae":
            raise DictionaryError(
                f"{found.path} is a {kind}, no dictionary of one site; sae and clt are read"
            )
        return self._one(found, config, file, options)

    def _one(
        self, found: Found, config: Mapping[str, Any], file: TensorFile, options: LoadOptions
    ) -> Raw:
        _refuse_glu(file)
        hook_in = str(config.get("hook_point_in") or options.hook or "")
        hook_out = str(config.get("hook_point_out") or hook_in)
        encoder = matrix(file, "W_E", options, features_first=False)
        decoder = matrix(file, "W_D", options, features_first=True)
        s_in, s_out = (
            _scale(config, file, options, hook, width)
            for hook, width in ((hook_in, encoder.shape[1]), (hook_out, decoder.shape[1]))
        )
        token = config.get("norm_activation") == "token-wise"
        return Raw(
            format=self.name,
            reads=site_of(hook_in, found.path),
            writes=(site_of(hook_out, found.path),),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=vector_or_zeros(file, options, "b_E", encoder.shape[0]),
            b_dec=vector_or_zeros(file, options, "b_D", decoder.shape[1]),
            gate=_gate(config, file, options, encoder.shape[0], None),
            pre_bias=bool(config.get("apply_decoder_bias_to_pre_encoder")),
            input_scale=s_in,
            output_scale=s_out,
            units="raw",
            rank_by_norm=bool(config.get("sparsity_include_decoder_norm")),
            token_norm=TokenNorm("constant_norm_rescale") if token else None,
            facts=_facts(config),
        )

    def _cross_layer(
        self, found: Found, config: Mapping[str, Any], file: TensorFile, options: LoadOptions
    ) -> Raw:
        """Read one source layer: decoders are grouped by the layer they write into."""
        layer = found.layer or 0
        hooks_in = cast("list[str]", config["hook_points_in"])
        hooks_out = cast("list[str]", config["hook_points_out"])
        width = file.entry("W_E").shape[1]
        s_in = _scale(config, file, options, hooks_in[layer], width)
        n = file.entry("W_E").shape[2]
        decoders: list[Any] = []
        for target in range(layer, len(hooks_out)):
            s_out = _scale(config, file, options, hooks_out[target], width)
            decoders.append(
                matrix(
                    file,
                    f"W_D.{target}",
                    options,
                    features_first=True,
                    part=lambda values, source=layer: values[source],
                    times=1 / s_out,
                )
            )
        own = _scale(config, file, options, hooks_out[layer], width)
        return Raw(
            format=self.name,
            reads=site_of(hooks_in[layer], found.path),
            writes=tuple(site_of(hook, found.path) for hook in hooks_out[layer:]),
            encoder=matrix(
                file, "W_E", options, features_first=False, part=lambda values: values[layer]
            ),
            decoders=tuple(decoders),
            b_enc=vector(file, options, "b_E")[layer],
            b_dec=vector_or_zeros(file, options, f"b_D.{layer}", width) / own,
            gate=_gate(config, file, options, n, layer),
            input_scale=s_in,
            units="raw",
            facts=_facts(config),
        )


def _refuse_glu(file: TensorFile) -> None:
    if "W_E_glu" in file:
        raise DictionaryError(
            f"{file.path} has a GLU encoder, whose features read no single direction; it cannot be "
            "used here"
        )


def _scale(
    config: Mapping[str, Any], file: TensorFile, options: LoadOptions, hook: str, width: int
) -> float:
    kind = config.get("norm_activation") or "inference"
    if kind in ("inference", "none", "token-wise"):
        return 1.0
    if kind != "dataset-wise":
        raise DictionaryError(f"{file.path}: norm_activation '{kind}' depends on the batch")
    if _NORM + hook in file:
        return sqrt(width) / float(file.view(_NORM + hook).double())
    if options.activation_scale is None:
        raise DictionaryError(
            f"{file.path} does not store the norm of {hook}; give activation_scale"
        )
    return options.activation_scale


def _gate(
    config: Mapping[str, Any], file: TensorFile, options: LoadOptions, n: int, layer: int | None
) -> Gate:
    kind = str(config.get("act_fn", "relu")).lower()
    if kind == "jumprelu":
        threshold: Tensor = vector(file, options, _THRESHOLD).exp()
        if layer is not None and threshold.ndim == 2:
            threshold = threshold[layer]
        return JumpRelu(threshold.expand(n).contiguous())
    if kind == "relu":
        return Relu()
    k = options.k or config.get("top_k") or config.get("k")
    if not isinstance(k, int):
        raise DictionaryError(f"{file.path}: act_fn '{kind}' needs top_k; give k")
    return BatchTopK(k) if "batch" in kind else TopK(k)


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": config.get("act_fn"),
        "k": config.get("top_k"),
        "expected_l0": config.get("top_k"),
        "model_name": config.get("model_name"),
    }
