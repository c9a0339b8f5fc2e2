"""What F11 and F12 share: two linear modules in one torch file, ReLU, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Relu
from layerscope.features.formats.base import (
    Format,
    Found,
    LoadOptions,
    Raw,
    layer_in,
    matrix,
    site_of,
    vector,
)
from layerscope.features.tensors import open_tensors
from layerscope.models.sites import Site

_LAYER = re.compile(r"(?:^|[-_.])l(\d+)(?=[-_.]|$)", re.IGNORECASE)
_NOT_OURS = ("ae.pt",)


class LinearModules(Format):
    """``{encoder}.weight`` [n, d], ``{decoder}.weight`` [d, n], both with a bias.

    Attributes:
        encoder, decoder: names of the modules.
    """

    encoder: str
    decoder: str
    patterns = ("*.pt", "*.pth")

    def find(self, root: Path) -> list[Found]:
        """Return the torch files with these modules."""
        paths = [root] if root.is_file() else [*root.rglob("*.pt"), *root.rglob("*.pth")]
        found: list[Found] = []
        for path in sorted(paths):
            if path.suffix in (".pt", ".pth") and path.name not in _NOT_OURS and self._ours(path):
                match = _LAYER.search(path.stem)
                layer = int(match[1]) if match else layer_in(path.stem)
                found.append(Found(self.code, path, layer, path.name))
        return found

    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a file; raises DictionaryError."""
        file = open_tensors(found.path)
        if found.layer is None:
            site = site_of(options.hook, found.path)
        else:
            site = Site("resid_post", found.layer)
        return Raw(
            format=self.name,
            reads=site,
            writes=(site,),
            encoder=matrix(file, f"{self.encoder}.weight", options, features_first=True),
            decoders=(matrix(file, f"{self.decoder}.weight", options, features_first=False),),
            b_enc=vector(file, options, f"{self.encoder}.bias"),
            b_dec=vector(file, options, f"{self.decoder}.bias"),
            gate=Relu(),
            facts={"architecture": "standard"},
        )

    def _ours(self, path: Path) -> bool:
        try:
            names = open_tensors(path).names()
        except DictionaryError:
            return False
        return {f"{self.encoder}.weight", f"{self.decoder}.weight"} <= set(names)
