"""F10: Qwen-Scope. ``layer{n}.sae.pt``, TopK with its k in the repository's name."""

from __future__ import annotations

import re
from pathlib import Path

from layerscope.errors import DictionaryError
from layerscope.features.architectures import TopK
from layerscope.features.formats.base import Format, Found, LoadOptions, Raw, matrix, vector
from layerscope.features.tensors import open_tensors
from layerscope.models.sites import Site

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_K = re.compile(r"L0_(\d+)")


class QwenScope(Format):
    """Residual dictionaries of Qwen models: W_enc [n, d], W_dec [d, n], no pre-bias."""

    code, name = "F10", "qwen_scope"
    title = "Qwen-Scope (layer{n}.sae.pt)"
    patterns = ("*.sae.pt",)

    def find(self, root: Path) -> list[Found]:
        """Return the files named layer{n}.sae.pt."""
        paths = [root] if root.is_file() else sorted(root.rglob("layer*.sae.pt"))
        matches = [(path, _FILE.fullmatch(path.name)) for path in paths]
        return [Found(self.code, path, int(m[1]), path.name) for path, m in matches if m]

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a file; raises DictionaryError."""
        file = open_tensors(found.path)
        named = _K.findall(str(found.path))
        k = options.k or (int(named[-1]) if named else None)
        if k is None:
            raise DictionaryError(
                f"{found.path}: k is in the repository's name (...-L0_50); give k"
            )
        site = Site("resid_post", found.layer)
        return Raw(
            format=self.name,
            reads=site,
            writes=(site,),
            encoder=matrix(file, "W_enc", options, features_first=True),
            decoders=(matrix(file, "W_dec", options, features_first=False),),
            b_enc=vector(file, options, "b_enc"),
            b_dec=vector(file, options, "b_dec"),
            gate=TopK(k),
            facts={"architecture": "topk", "k": k, "expected_l0": k},
        )
