"""F3: Gemma Scope 2. ``params.safetensors``: dictionaries, affine and cross-layer transcoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import JumpRelu
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    layer_in,
    matrix,
    read_json,
    site_of,
    vector,
)
from layerscope.features.tensors import TensorFile, open_tensors
from layerscope.models.sites import Site

CONFIG = "config.json"
# Kind of folder: what it reads and writes.
_KINDS = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("attn.z", "attn.z"),
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
    "clt": ("mlp_in", "mlp_out"),
}
_NEEDED = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


class GemmaScope2(Format):
    """Gemma Scope 2; hooks from config.json where there is one, else from the folder's name."""

    code, name = "F3", "gemma_scope_2"
    title = "Gemma Scope 2 (params.safetensors)"
    patterns = ("*params*.safetensors", "*clt/*.safetensors", "*config.json")

    def find(self, root: Path) -> list[Found]:
        """Return the safetensors files with Gemma Scope 2's five tensors."""
        paths = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
        found: list[Found] = []
        for path in paths:
            if path.suffix == ".safetensors" and _ours(path):
                layer = layer_in(path.stem)
                layer = layer_in(path.parent.name) if layer is None else layer
                label = path.parent.name if path.stem.startswith("params") else path.stem
                found.append(Found(self.code, path, layer, label))
        return found

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a file; raises DictionaryError."""
        file = open_tensors(found.path)
        reads, writes = _sites(found, options)
        encoder = matrix(file, "w_enc", options, features_first=False)
        shape = file.entry("w_dec").shape
        sites = [writes]
        if len(shape) == 3:
            own = reads.layer or 0
            decoders = [
                matrix(file, "w_dec", options, features_first=True, part=_slot(layer))
                for layer in range(own, shape[1])
            ]
            sites = [Site(writes.kind, layer) for layer in range(own, shape[1])]
        else:
            decoders = [matrix(file, "w_dec", options, features_first=True)]
        skip = None
        if "affine_skip_connection" in file:
            # Stored for x A; a skip matrix here is applied as x W^T.
            skip = vector(file, options, "affine_skip_connection").T.contiguous()
        return Raw(
            format=self.name,
            reads=reads,
            writes=tuple(sites),
            encoder=encoder,
            decoders=tuple(decoders),
            b_enc=vector(file, options, "b_enc"),
            b_dec=_own_bias(file, options, reads),
            gate=JumpRelu(vector(file, options, "threshold")),
            skip=skip,
            facts={"architecture": "jumprelu", "model_name": _config(found.path).get("model_name")},
        )


def _slot(layer: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values[:, layer]


def _own_bias(file: TensorFile, options: LoadOptions, reads: Site) -> Tensor:
    bias = vector(file, options, "b_dec")
    return bias[reads.layer or 0] if bias.ndim == 2 else bias


def _sites(found: Found, options: LoadOptions) -> tuple[Site, Site]:
    config = _config(found.path)
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if hook_in:
        reads = site_of(str(hook_in), found.path, layer=found.layer)
        out = site_of(str(hook_out), found.path, layer=found.layer) if hook_out else reads
        return reads, out
    for part in reversed(found.path.parts[:-1]):
        for kind, (reads, writes) in _KINDS.items():
            if part.startswith(kind) and found.layer is not None:
                return Site(reads, found.layer), Site(writes, found.layer)
    if options.hook is None:
        raise DictionaryError(
            f"{found.path} does not say what it reads: it lies in no folder {', '.join(_KINDS)}, "
            "and has no config.json; give hook"
        )
    site = Site("resid_post", found.layer or 0)
    return site, site


def _config(path: Path) -> dict[str, object]:
    config = path.parent / CONFIG
    return read_json(config) if config.is_file() else {}


def _ours(path: Path) -> bool:
    try:
        names = open_tensors(path).names()
    except DictionaryError:
        # A file by this format's name is ours to complain about; others are somebody else's.
        return path.name == "params.safetensors"
    return all(name in names for name in _NEEDED)
