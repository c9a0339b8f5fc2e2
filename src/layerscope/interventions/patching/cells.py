"""What one cell of a sweep changes, and what of the model's pass that leaves as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError, EditError, SiteError
from layerscope.models import LanguageModel, Site

# What a block does with these at one position reaches its later positions.
_SPREADING = ("resid_pre", "attn_in", "attn.q_pre", "attn.k_pre", "attn.k", "attn.v")
_UNITS = ("attn.z", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.scores", "mlp.post")


@dataclass(frozen=True, eq=False)
class Patch:
    """Values put in place of a site's, at some positions of a row.

    Attributes:
        site: a site of one layer, of all heads (a single one is a `unit`).
        columns: token positions, ascending.
        value: [pos, ...] as the site has it, without the unit's axis where there is a unit.
        unit: one head, key-value head or neuron; None for the whole site.
    """

    site: Site
    columns: tuple[int, ...]
    value: Float[Tensor, "pos ..."]
    unit: int | None = None

    @property
    def layer(self) -> int:
        """The block it acts in."""
        assert self.site.layer is not None
        return self.site.layer

    @property
    def spreads(self) -> bool:
        """Whether the same block carries it to later positions."""
        return self.site.kind in _SPREADING

    def at(self, columns: Sequence[int]) -> Patch:
        """Return the part of it at some of its positions."""
        places = [self.columns.index(column) for column in columns]
        return replace(self, columns=tuple(columns), value=self.value[places])


@dataclass(frozen=True, eq=False)
class Cell:
    """One intervention on one row of a recording: its patches act together."""

    patches: tuple[Patch, ...]
    row: int = 0


@dataclass(frozen=True, eq=False)
class Step:
    """A cell as the engine takes it: from where on the pass differs from the recording.

    Attributes:
        index: of the cell in the sweep.
        entry: first block whose input differs; equal to `first` unless the first block's work is
            needed at the patched positions alone.
        first: first block that a patch acts in.
        column: first position at which anything differs.
        last: last position at which `first` is changed; only used where ``entry > first``.
    """

    index: int
    row: int
    patches: tuple[Patch, ...]
    entry: int
    first: int
    column: int
    last: int


def site_of(model: LanguageModel, name: str | Site) -> Site:
    """Return a site that cells can act on.

    Raises:
        SiteError: it belongs to no layer, or to one head (which is a unit of the site of all).
        CapabilityError: this model or backend cannot read or edit it.
    """
    backend = model.backend
    site = Site.parse(name).resolve(model.n_layers, model.n_heads, model.n_kv_heads)
    if site.layer is None or site.kind in ("mlp.router", "mlp.experts"):
        raise SiteError(
            f"'{site}' cannot be patched in a sweep; use a site of a layer, such as resid_pre.0, "
            "attn_out.0 or attn.0.z"
        )
    if site.head is not None or site.kv_head is not None:
        raise SiteError(f"'{site}' is one head; patch '{site.whole}' with its number as the unit")
    reason = backend.why_not(site) or backend.why_not_edit(site)
    if reason is not None:
        raise CapabilityError(reason)
    return site


def check_cell(model: LanguageModel, cell: Cell, n_rows: int, n_columns: int) -> None:
    """Raise EditError or SiteError for a cell that does not fit the model or the recording."""
    if not cell.patches:
        raise EditError("a cell has no patch; give it at least one")
    if not 0 <= cell.row < n_rows:
        raise EditError(f"a cell names row {cell.row}; the recording has rows 0 to {n_rows - 1}")
    for patch in cell.patches:
        columns = patch.columns
        if not columns or list(columns) != sorted(set(columns)):
            raise EditError(f"the patch of '{patch.site}' needs positions, ascending, each once")
        if columns[0] < 0 or columns[-1] >= n_columns:
            raise EditError(
                f"the patch of '{patch.site}' names position {columns[-1]}; the prompt has "
                f"{n_columns} tokens"
            )
        shape = model.backend.trailing(patch.site, n_columns)
        if patch.site.pos_axis == 2:  # [head, key] of one query
            shape = (shape[0], shape[-1])
        if patch.unit is not None:
            if patch.site.kind not in _UNITS:
                raise SiteError(f"'{patch.site}' has no units; leave the unit out")
            if not 0 <= patch.unit < shape[0]:
                raise SiteError(f"'{patch.site}' has units 0 to {shape[0] - 1}, not {patch.unit}")
            shape = shape[1:]
        if tuple(patch.value.shape) != (len(columns), *shape):
            raise EditError(
                f"the patch of '{patch.site}' has a value of shape {list(patch.value.shape)}; it "
                f"needs {[len(columns), *shape]}"
            )


def step_of(cell: Cell, index: int, *, n_layers: int, n_columns: int, columns: bool) -> Step | None:
    """Return where the pass of a cell begins; None for one that cannot reach the last logits.

    `columns` says that passes can be resumed at a position.
    """
    end = n_columns - 1
    patches: list[Patch] = []
    for patch in map(_as_input, cell.patches, [n_layers] * len(cell.patches)):
        if patch.layer == n_layers - 1 and not patch.spreads:
            # Nothing after the last block's attention mixes positions.
            if end not in patch.columns:
                continue
            patch = patch.at([end])
        patches.append(patch)
    if not patches:
        return None
    first = min(patch.layer for patch in patches)
    column = min(patch.columns[0] for patch in patches) if columns else 0
    opening = [patch for patch in patches if patch.layer == first]
    last = max(patch.columns[-1] for patch in opening)
    # The keys of a pattern must all be there.
    local = not any(patch.spreads or patch.site.pos_axis == 2 for patch in opening)
    local = local and first < n_layers - 1
    entry = first + 1 if local and last < end else first
    return Step(index, cell.row, tuple(patches), entry, first, column, last)


def _as_input(patch: Patch, n_layers: int) -> Patch:
    """Return a patch of what a block leaves as one of what the next block reads."""
    if patch.site.kind == "resid_post" and patch.layer < n_layers - 1:
        return replace(patch, site=Site("resid_pre", patch.layer + 1))
    return patch
