"""F8: dictionary_learning. ``ae.pt`` and ``config.json``, seven classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from layerscope.errors import DictionaryError, nearest
from layerscope.features.architectures import BatchTopK, Gate, Gated, JumpRelu, Relu, TopK
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    Units,
    folders_with,
    layer_in,
    matrix,
    read_json,
    site_of,
    vector,
)
from layerscope.features.tensors import TensorFile, open_tensors
from layerscope.models.sites import Site

CONFIG, WEIGHTS = "config.json", "ae.pt"
_CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK",
    "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
)  # fmt: skip


class DictionaryLearning(Format):
    """The library of Marks, Karvonen and Mueller, and of sparse feature circuits."""

    code, name = "F8", "dictionary_learning"
    title = "dictionary_learning (ae.pt, config.json)"
    patterns = ("*config.json", "*ae.pt")

    def find(self, root: Path) -> list[Found]:
        """Return the folders with an ae.pt and a config.json."""
        return [
            Found(self.code, folder, _layer(folder), folder.name)
            for folder in folders_with(root, WEIGHTS, CONFIG)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        trainer = _trainer(found.path)
        file = open_tensors(found.path / WEIGHTS)
        kind = str(trainer.get("dict_class") or _guess(file))
        if kind not in _CLASSES:
            raise DictionaryError(
                f"{found.path}: unknown dict_class '{kind}'{nearest(kind, _CLASSES)}; known: "
                f"{', '.join(_CLASSES)}"
            )
        direct = "W_enc" in file
        names = ("W_enc", "W_dec") if direct else ("encoder.weight", "decoder.weight")
        encoder = matrix(file, names[0], options, features_first=not direct)
        decoder = matrix(file, names[1], options, features_first=direct)
        n, d = decoder.shape
        gate, b_enc = _gate(kind, file, trainer, options, n)
        bias = "b_dec"
        units: Units = "stored"
        if kind == "AutoEncoder":
            bias = "bias"
            units = "unit" if options.normalize_decoder else "stored"
        elif kind == "AutoEncoderNew":
            bias = "decoder.bias"
        elif kind == "GatedAutoEncoder":
            bias = "decoder_bias"
        site = _site(trainer, found, options)
        return Raw(
            format=self.name,
            reads=site,
            writes=(site,),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=b_enc,
            b_dec=vector(file, options, bias) if bias in file else torch.zeros(d),
            gate=gate,
            pre_bias=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
            units=units,
            notes=(kind,),
            facts={
                "architecture": kind,
                "k": trainer.get("k"),
                "expected_l0": trainer.get("k"),
                "model_name": trainer.get("lm_name"),
            },
        )


def _gate(
    kind: str, file: TensorFile, trainer: Mapping[str, Any], options: LoadOptions, n: int
) -> tuple[Gate, Tensor]:
    if kind == "GatedAutoEncoder":
        b_gate = vector(file, options, "gate_bias")
        r_mag, b_mag = (vector(file, options, name) for name in ("r_mag", "mag_bias"))
        return Gated.of(r_mag, b_gate, b_mag), b_gate
    b_enc = vector(file, options, "b_enc", "encoder.bias")
    if kind == "JumpReluAutoEncoder":
        return JumpRelu(vector(file, options, "threshold")), b_enc
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return Relu(), b_enc
    k = options.k or trainer.get("k") or _number(file, "k")
    if not isinstance(k, int | float):
        raise DictionaryError(f"{file.path} does not say its k; give k")
    threshold = _number(file, "threshold")
    if kind != "AutoEncoderTopK" and threshold is not None and threshold >= 0:
        values = torch.full((n,), threshold, device=options.device)
        words = f"{threshold:.4g} (one for all, trained as batch topk k={int(k)})"
        return JumpRelu(values, words=words), b_enc
    return (TopK(int(k)) if kind == "AutoEncoderTopK" else BatchTopK(int(k))), b_enc


def _number(file: TensorFile, name: str) -> float | None:
    if name in file and file.entry(name).shape == ():
        return float(file.view(name).double())
    value = file.values.get(name)
    return float(value) if isinstance(value, int | float) else None


def _guess(file: TensorFile) -> str:
    """Return the class by what only it stores, for files whose configuration does not say."""
    for tensor, kind in (
        ("r_mag", "GatedAutoEncoder"),
        ("bias", "AutoEncoder"),
        ("decoder.bias", "AutoEncoderNew"),
    ):
        if tensor in file:
            return kind
    return "unknown"


def _trainer(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    return cast("dict[str, Any]", config.get("trainer") or {})


def _layer(folder: Path) -> int | None:
    try:
        layer = _trainer(folder).get("layer")
    except DictionaryError:
        layer = None
    return layer if isinstance(layer, int) else layer_in(folder.name)


def _site(trainer: Mapping[str, Any], found: Found, options: LoadOptions) -> Site:
    name = str(trainer.get("submodule_name") or "")
    match = re.fullmatch(
        r"(resid_post|resid_pre|mlp_out|attn_out|attention_out)_layer_?(\d+)", name
    )
    if match:
        return Site(match[1].replace("attention", "attn"), int(match[2]))
    if name or options.hook:
        return site_of(options.hook or name, found.path, layer=found.layer)
    if found.layer is None:
        return site_of(None, found.path)
    return Site("resid_post", found.layer)
