"""F5: Llama Scope for R1 distillations. ``config.json``, with a trained threshold per feature."""

from __future__ import annotations

from pathlib import Path

from layerscope.errors import DictionaryError
from layerscope.features.architectures import JumpRelu
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    folders_with,
    layer_in,
    read_json,
    vector,
)
from layerscope.features.formats.llama_scope import read_open_moss
from layerscope.features.tensors import open_tensors

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"


class LlamaScopeR1(Format):
    """Names of Llama Scope, and ``log_jumprelu_threshold``."""

    code, name = "F5", "llama_scope_r1"
    title = "Llama Scope R1-distill (config.json, log_jumprelu_threshold)"
    patterns = ("*config.json", "*sae_weights.safetensors")

    def find(self, root: Path) -> list[Found]:
        """Return the folders whose weights have a log_jumprelu_threshold beside an encoder."""
        return [
            Found(self.code, folder, _layer(folder), folder.name)
            for folder in folders_with(root, CONFIG, WEIGHTS)
            if _ours(folder / WEIGHTS)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        file = open_tensors(found.path / WEIGHTS)
        threshold = vector(file, options, "log_jumprelu_threshold").exp()
        return read_open_moss(
            self.name,
            read_json(found.path / CONFIG),
            file,
            options,
            gate=JumpRelu(threshold),
            gate_is_final=False,
            units="raw",
        )


def _ours(path: Path) -> bool:
    try:
        file = open_tensors(path)
    except DictionaryError:
        return False
    return "encoder.weight" in file and "log_jumprelu_threshold" in file


def _layer(folder: Path) -> int | None:
    hook = read_json(folder / CONFIG).get("hook_point_in")
    found = layer_in(str(hook)) if hook else None
    return layer_in(folder.name) if found is None else found
