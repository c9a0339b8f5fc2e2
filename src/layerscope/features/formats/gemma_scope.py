"""F2: Gemma Scope 1. ``params.npz`` of JumpReLU dictionaries, float32."""

from __future__ import annotations

from math import sqrt
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
    matrix,
    vector,
)
from layerscope.features.tensors import open_tensors
from layerscope.models.sites import Site

WEIGHTS = "params.npz"
# The release is in the name of the repository; what it reads and writes.
_RELEASES = (
    ("transcoders", "mlp_in", "mlp_out"),
    ("-res", "resid_post", "resid_post"),
    ("-mlp", "mlp_out", "mlp_out"),
    ("-att", "attn.z", "attn.z"),
)


class GemmaScope(Format):
    """Gemma Scope 1; the release (-res, -mlp, -att, -transcoders) is read from the path."""

    code, name = "F2", "gemma_scope"
    title = "Gemma Scope 1 (params.npz)"
    patterns = ("*params.npz",)

    def find(self, root: Path) -> list[Found]:
        """Return the folders with a params.npz."""
        return [
            Found(self.code, folder, _layer(folder), "/".join(folder.parts[-3:]))
            for folder in folders_with(root, WEIGHTS)
        ]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a folder; raises DictionaryError."""
        file = open_tensors(found.path / WEIGHTS)
        embedding = "embedding" in found.path.parts
        reads, writes = _sites(found, options, embedding=embedding)
        names = {name.lower(): name for name in file.names()}
        if "w_enc" not in names or "w_dec" not in names:
            raise DictionaryError(
                f"{file.path} is no Gemma Scope dictionary: W_enc or W_dec is absent"
            )
        encoder = matrix(file, names["w_enc"], options, features_first=False)
        decoder = matrix(file, names["w_dec"], options, features_first=True)
        # Trained on the embedding before it is multiplied by sqrt(d).
        scale = 1 / sqrt(encoder.shape[1]) if embedding else 1.0
        return Raw(
            format=self.name,
            reads=reads,
            writes=(writes,),
            encoder=encoder,
            decoders=(decoder,),
            b_enc=vector(file, options, "b_enc"),
            b_dec=vector(file, options, "b_dec"),
            gate=JumpRelu(vector(file, options, "threshold")),
            input_scale=scale,
            output_scale=scale,
            norm_words="embedding / sqrt(d), folded" if embedding else "",
            facts={"architecture": "jumprelu", "expected_l0": _l0(found.path)},
        )


def _sites(found: Found, options: LoadOptions, *, embedding: bool) -> tuple[Site, Site]:
    if embedding:
        return Site("resid_pre", 0), Site("resid_pre", 0)
    text = str(found.path).lower()
    for word, reads, writes in _RELEASES:
        if word in text and found.layer is not None:
            return Site(reads, found.layer), Site(writes, found.layer)
    if options.hook is None:
        raise DictionaryError(
            f"{found.path} does not say what it reads (a path with -res, -mlp, -att or "
            "-transcoders would); give hook='resid_post.L'"
        )
    site = Site("resid_post", found.layer or 0)  # replaced by the hook that was given
    return site, site


def _layer(folder: Path) -> int | None:
    for part in reversed(folder.parts):
        layer = layer_in(part)
        if layer is not None:
            return layer
    return 0 if "embedding" in folder.parts else None


def _l0(folder: Path) -> float | None:
    name = folder.name.removeprefix("average_l0_")
    return float(name) if name != folder.name and name.isdigit() else None
