"""Where each site of a Hugging Face model lives, what shape it has, and why some do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from layerscope.models.backends.base import ModelInfo
from layerscope.models.backends.huggingface.hooks import Carrier, Point
from layerscope.models.backends.huggingface.inner import InnerPoints
from layerscope.models.backends.huggingface.kernel import KernelShape
from layerscope.models.backends.huggingface.structure import Block, Named, Structure
from layerscope.models.backends.huggingface.views import Stream, View, Whole
from layerscope.models.sites import GLOBAL_KINDS, INNER_KINDS, LAYER_KINDS, Site

_LOGITS = Site("logits")


class Points:
    """The sites of one model.

    `probe` runs a short pass and returns what each attention kernel reads; it is called once, when
    a site inside attention is first asked for.
    """

    def __init__(
        self,
        structure: Structure,
        info: ModelInfo,
        probe: Callable[[], dict[nn.Module, KernelShape]],
    ) -> None:
        self._structure = structure
        self._info = info
        self._inner = InnerPoints(structure, info, probe)
        self._withdrawn: dict[str, str] = {}
        self._found: dict[Site, Point | str] = {}

    def sites(self) -> list[Site]:
        """Return every site without the per-head ones, in the order of the forward pass."""
        return [site for site in self._candidates() if self.why_not(site) is None]

    def withdraw(self, kinds: Sequence[str], reason: str) -> None:
        """Refuse sites of these kinds, because of what a check found."""
        self._withdrawn.update(dict.fromkeys(kinds, reason))

    def checks(self, values: Mapping[Site, Tensor]) -> Iterator[tuple[str, float, str]]:
        """Yield (identity, error, where) for what lies inside the sublayers."""
        for layer, block in enumerate(self._structure.blocks):
            for name, error in self._inner.checks(layer, block, values):
                yield name, error, f"block {layer}"

    def __getitem__(self, site: Site) -> Point:
        """Return where an available site lives."""
        point = self._find(site)
        assert isinstance(point, Point), point
        return point

    def why_not(self, site: Site) -> str | None:
        """Return None when the site exists, else one line saying why not."""
        withdrawn = self._withdrawn.get(site.kind)
        if withdrawn is not None:
            return f"'{site}' is refused: {withdrawn}"
        if site == _LOGITS:
            return None
        found = self._find(site)
        return f"'{site}' {found}" if isinstance(found, str) else None

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when an existing site can be edited."""
        return self._inner.why_not_edit(site, self._block(site)) if "." in site.kind else None

    def trailing(self, site: Site, n_keys: int) -> tuple[int, ...]:
        """Return the axes of a site's value without those of batch and positions."""
        info = self._info
        if site.kind == "logits":
            return (info.d_vocab,)
        group, _, leaf = site.kind.partition(".")
        if not leaf or leaf == "out":
            return (info.d_model,)
        if group == "mlp":
            return (self._inner.mlp_width(site, self._block(site)),)
        n_heads, width = self._inner.head_shape(site, self._block(site), n_keys)
        alone = site.head is not None or site.kv_head is not None
        return (width,) if alone else (n_heads, width)

    def _candidates(self) -> Iterator[Site]:
        yield Site("embed")
        for layer in range(len(self._structure.blocks)):
            before, after = LAYER_KINDS[:2], LAYER_KINDS[2:5]
            yield from (Site(kind, layer) for kind in before)
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("attn"))
            yield from (Site(kind, layer) for kind in after)
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("mlp"))
            yield from (Site(kind, layer) for kind in LAYER_KINDS[5:])
        yield from (Site(kind) for kind in GLOBAL_KINDS[1:])

    def _find(self, site: Site) -> Point | str:
        """Return where a site lives, or why it does not exist."""
        found = self._found.get(site)
        if found is None:
            if site.layer is None:
                found = self._find_global(site)
            elif "." in site.kind:
                found = self._inner.find(site, self._block(site))
            else:
                found = self._find_in_stream(site, self._block(site))
            self._found[site] = found
        return found

    def _find_global(self, site: Site) -> Point:
        structure = self._structure
        if site.kind == "embed":
            return self._output(site, structure.embedding)
        normed_first = structure.embedding_norm
        again = normed_first is not None and normed_first.module is structure.final_norm.module
        return Point(Carrier(structure.final_norm.module, "output", call=int(again)))

    def _find_in_stream(self, site: Site, block: Block) -> Point | str:
        structure = self._structure
        scale = Whole(structure.branch_scale)
        stream = structure.row.stream
        whole = Whole() if stream is None else Stream(*stream)
        if site.kind == "resid_mid" and structure.parallel:
            return (
                f"does not exist in {self._info.family}: attention and MLP of a block read the "
                "same residual in parallel; use resid_pre, attn_out, mlp_out or resid_post"
            )
        reader = block.mlp_norm or block.mlp
        beside = block.mlp_beside
        if beside is not None and site.kind == "mlp_out":
            # The model adds what both give, before it scales the sum.
            return Point(
                Carrier(beside.module, "output", plus=block.mlp_out.module),
                scale,
            )
        return {
            "resid_pre": lambda: _input(block.whole, whole),
            "attn_in": lambda: self._read(site, block.attention, block.input_norm),
            "attn_out": lambda: self._output(site, block.attention_out, scale),
            "resid_mid": lambda: Point(Carrier(reader.module, "input", shared=True)),
            "mlp_in": lambda: self._read(site, block.mlp, block.mlp_norm),
            "mlp_out": lambda: self._output(site, block.mlp_out, scale),
            "resid_post": lambda: self._output(site, block.whole, whole),
        }[site.kind]()

    def _read(self, site: Site, sublayer: Named, norm: Named | None) -> Point:
        """Return what a sublayer reads; where several modules read it, what its norm gives."""
        if norm is not None and site.kind in self._structure.row.read_apart:
            return Point(Carrier(norm.module, "output"))
        return _input(sublayer)

    def _output(self, site: Site, part: Named, view: View | None = None) -> Point:
        copied = site.kind in self._structure.row.overwritten
        return Point(Carrier(part.module, "output", copied=copied), view or Whole())

    def _block(self, site: Site) -> Block:
        assert site.layer is not None
        return self._structure.blocks[site.layer]


def _input(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.module, "input"), view or Whole())
