"""One forward pass: what to capture, what to edit, where to start and stop, and what came out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import (
    CapabilityError,
    ConfigError,
    EditError,
    PromptError,
    SiteError,
    nearest,
)
from layerscope.models.backends.base import Capability, ModelInfo
from layerscope.models.edits import Edit, Positions, ResampleAblate, columns_of, rows_of
from layerscope.models.scopes import scoped
from layerscope.models.sites import Site, expand

if TYPE_CHECKING:
    from layerscope.models.backends.base import Backend, Cache
    from layerscope.models.prompts import TokenBatch

Logits: TypeAlias = Literal["all", "last"] | Positions | None
Gradients: TypeAlias = bool | Literal["batched"]


@dataclass(frozen=True)
class Capture:
    """What to keep of a run.

    Captured tensors are what the model itself computed, not copies, unless `positions`, `device` or
    `dtype` ask for something else; two sites that are one tensor in the model (``resid_post.0`` and
    ``resid_pre.1``) may share memory, so copy before writing to one.

    Attributes:
        sites: names, patterns or `Site`s.
        positions: token positions to keep (see `Positions`), sliced as soon as they are computed;
            None keeps every column, padding included.
        device: move to this device as captured ("cpu" frees the accelerator); None leaves it.
        dtype: convert as captured; None leaves it.
    """

    sites: str | Site | Sequence[str | Site]
    positions: Positions | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """Begin at block `layer` (negative: from the last) with a stored input residual.

    The residual is what ``resid_pre.{layer}`` held for the same ids and padding; in a run that
    continues a cache, for the ids of this run alone. Blocks below are not computed.
    """

    layer: int
    residual: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Piece:
    """Rows of equal width that continue equally many columns of a cache.

    Attributes:
        column: stored columns that each row continues; its tokens stand at this position and after.
        rows: the cache's row that each continues.
        width: tokens of each.
    """

    column: int
    rows: tuple[int, ...]
    width: int

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return len(self.rows) * self.width


@dataclass(frozen=True)
class Packed:
    """Rows of different beginnings and lengths, laid one after the other into a single row.

    Each sees the columns before it in its row of the cache, and of the single row itself alone. No
    token is computed for padding.
    """

    pieces: tuple[Piece, ...]

    @property
    def n_columns(self) -> int:
        """Length of the longest row with what it continues."""
        return max(piece.column + piece.width for piece in self.pieces)

    @functools.cached_property
    def table(self) -> Int[Tensor, "row 4"]:
        """For every row: its first token, its first column, its width, the cache's row."""
        found: list[tuple[int, int, int, int]] = []
        at = 0
        for piece in self.pieces:
            for row in piece.rows:
                found.append((at, piece.column, piece.width, row))
                at += piece.width
        return torch.tensor(found)

    def position_ids(self) -> Int[Tensor, "1 pos"]:
        """Return the position of every token in its own row."""
        begin, column, width, _ = self.table.unbind(1)
        return (torch.arange(int(width.sum())) + (column - begin).repeat_interleave(width))[None]


@dataclass(frozen=True, eq=False)
class PlannedCapture:
    """One site to keep; `columns` are padded columns, None for all."""

    site: Site
    columns: Int[Tensor, "batch pos"] | None
    device: torch.device | None
    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class PlannedEdit:
    """One edit at one site; `rows` and `columns` are None when it acts on everything."""

    site: Site
    edit: Edit
    rows: Int[Tensor, " row"] | None
    columns: Int[Tensor, "row pos"] | None


@dataclass(frozen=True, eq=False)
class RunPlan:
    """A validated run, in padded columns, that a backend can execute."""

    batch: TokenBatch
    captures: tuple[PlannedCapture, ...] = ()
    edits: tuple[PlannedEdit, ...] = ()
    start: Start | None = None
    stop_after: int | None = None
    logits: Literal["all"] | Int[Tensor, "batch pos"] | None = "all"
    gradients: Gradients = False
    cache: Cache | None = None
    keep_cache: bool = False
    lean: bool = False
    packed: Packed | None = None

    def wanted(self) -> Int[Tensor, "batch pos"] | None:
        """Return the only columns of the last block's output that anything reads; None for all."""
        last = ("final_norm", "logits")
        columns = [capture.columns for capture in self.captures if capture.site.kind in last]
        if self.logits is not None:
            columns.append(None if isinstance(self.logits, str) else self.logits)
        found = [some for some in columns if some is not None]
        return torch.cat(found, dim=1) if found and len(found) == len(columns) else None


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run gave back.

    Attributes:
        activations: by site, [batch, pos, d_model] for the residual stream and the sublayers'
            ends, [batch, pos, head, d_head] inside attention (``scores`` and ``pattern`` are
            [batch, head, query pos, key pos]), [batch, pos, d_mlp] for neurons; a per-head site
            lacks the head axis. pos are the columns of the padded batch, or the captured positions
            (of the queries, in a pattern; its keys are all columns).
        logits: [batch, pos, vocab] at the padded columns ("all") or the positions asked for (one
            for "last"); None when not asked for, or when the run stopped before them.
        batch: the ids that were run.
        positions: [batch, pos] padded columns of the captured positions; None when all were kept.
        products: which matrix products ran, as provenance; empty for "default".
        cache: keys and values of everything read so far, where they were to be kept.
    """

    activations: Mapping[Site, Tensor]
    logits: Float[Tensor, "batch pos vocab"] | None
    batch: TokenBatch
    positions: Int[Tensor, "batch pos"] | None = None
    products: Mapping[str, Any] = field(default_factory=dict[str, Any])
    info: ModelInfo | None = None
    cache: Cache | None = None

    def __getitem__(self, name: str | Site) -> Tensor:
        """Return the activation of one site by name; negative layers count from the last."""
        site = self._resolve(name)
        if site not in self.activations:
            captured = [str(known) for known in self.activations]
            raise SiteError(
                f"'{name}' was not captured{nearest(str(site), captured)}; captured: "
                f"{', '.join(captured) or 'nothing'}"
            )
        return self.activations[site]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str | Site) and self._resolve(name) in self.activations

    def __iter__(self) -> Iterator[Site]:
        return iter(self.activations)

    def _resolve(self, name: str | Site) -> Site:
        site = Site.parse(name)
        if self.info is None:
            return site
        return site.resolve(self.info.n_layers, self.info.n_heads, self.info.n_kv_heads)


def plan(
    backend: Backend,
    batch: TokenBatch,
    *,
    capture: Capture | str | Site | Sequence[str | Site] = (),
    edits: Sequence[Edit] = (),
    start: Start | None = None,
    stop_after: int | None = None,
    positions: Positions | None = None,
    logits: Logits = "all",
    gradients: Gradients = False,
    cache: Cache | None = None,
    keep_cache: bool = False,
    lean: bool = False,
    packed: Packed | None = None,
) -> RunPlan:
    """Validate a request against a backend and a batch, before anything is computed.

    Raises:
        SiteError, CapabilityError, EditError, PromptError, ConfigError: what is wrong, and the fix.
    """
    n_layers = backend.info.n_layers
    if stop_after is not None:
        stop_after = _layer(stop_after, n_layers, "stop_after")
    if start is not None:
        start = _check_start(start, batch, backend, stop_after)
    _check_cache(backend, cache, keep_cache, start is not None or stop_after is not None)
    if packed is not None:
        _check_packed(backend, batch, packed, cache, start, edits)
    reach = _Reach(backend, start.layer if start else 0, start is not None, stop_after, logits)
    if not isinstance(capture, Capture):
        capture = Capture(capture, positions=positions)
    elif positions is not None and capture.positions is None:
        capture = Capture(capture.sites, positions, capture.device, capture.dtype)
    return RunPlan(
        batch=batch,
        captures=_captures(capture, batch, reach),
        edits=tuple(
            planned for edit in scoped(edits, batch) for planned in _edits(edit, batch, reach)
        ),
        start=start,
        stop_after=stop_after,
        logits=_logits(logits, batch, stop_after),
        gradients=gradients,
        cache=cache,
        keep_cache=keep_cache,
        lean=lean,
        packed=packed,
    )


@dataclass(frozen=True)
class _Reach:
    """Which sites a run will pass."""

    backend: Backend
    first: int
    resumed: bool
    stop_after: int | None
    logits: Logits

    def sites(self, names: str | Site | Sequence[str | Site]) -> tuple[Site, ...]:
        info = self.backend.info
        sites = expand(
            names,
            n_layers=info.n_layers,
            n_heads=info.n_heads,
            n_kv_heads=info.n_kv_heads,
            available=lambda site: self.backend.why_not(site) is None,
        )
        for site in sites:
            self._check(site)
        return sites

    def _check(self, site: Site) -> None:
        reason = self.backend.why_not(site)
        if reason is not None:
            raise CapabilityError(reason)
        below = site.kind == "embed" or (site.layer is not None and site.layer < self.first)
        if self.resumed and below:
            raise SiteError(
                f"'{site}' lies before the start at block {self.first}, so this run never computes "
                "it; start earlier or leave it out"
            )
        beyond = site.kind in ("final_norm", "logits") or (
            site.layer is not None and self.stop_after is not None and site.layer > self.stop_after
        )
        if self.stop_after is not None and beyond:
            raise SiteError(
                f"'{site}' lies beyond stop_after={self.stop_after}, so this run never computes "
                "it; stop later or leave it out"
            )
        if site.kind == "logits" and self.logits != "all":
            raise SiteError("the site 'logits' needs the run's logits='all'")


def _captures(capture: Capture, batch: TokenBatch, reach: _Reach) -> tuple[PlannedCapture, ...]:
    columns = None
    if capture.positions is not None:
        columns = columns_of(batch, range(len(batch)), capture.positions)
    device = None if capture.device is None else torch.device(capture.device)
    return tuple(
        PlannedCapture(site, columns, device, capture.dtype) for site in reach.sites(capture.sites)
    )


def _edits(edit: Edit, batch: TokenBatch, reach: _Reach) -> Iterator[PlannedEdit]:
    if not isinstance(edit, Edit):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise EditError(f"{edit!r} is not an edit; use Add, Replace, ... or Apply(site, function)")
    rows = rows_of(edit, len(batch))
    columns = None
    if edit.positions is not None:
        try:
            columns = columns_of(batch, rows, edit.positions, edit)
        except PromptError as error:
            raise EditError(f"{type(edit).__name__} at '{edit.site}': {error}") from error
    elif edit.rows is not None:
        columns = torch.arange(batch.width).expand(len(rows), -1)
    if isinstance(edit, ResampleAblate):
        edit.sources(rows, len(batch))
    n_columns = batch.width if columns is None else columns.shape[1]
    for site in reach.sites(edit.site):
        reason = reach.backend.why_not_edit(site)
        if reason is not None:
            raise CapabilityError(reason)
        shape = [len(rows), *reach.backend.trailing(site, batch.n_keys)]
        shape.insert(site.pos_axis, n_columns)
        edit.check(shape)
        yield PlannedEdit(site, edit, None if columns is None else torch.tensor(rows), columns)


def _logits(
    logits: Logits, batch: TokenBatch, stop_after: int | None
) -> Literal["all"] | Int[Tensor, "batch pos"] | None:
    if logits is None or stop_after is not None:
        return None
    if isinstance(logits, str):
        if logits == "all":
            return "all"
        if logits != "last":
            raise ConfigError(f"logits={logits!r}; use 'all', 'last', None or positions")
        left = batch.padding_side == "left"
        return torch.tensor([[(batch.width if left else end) - 1] for end in batch.lengths])
    return columns_of(batch, range(len(batch)), logits)


def _layer(layer: int, n_layers: int, what: str) -> int:
    if not -n_layers <= layer < n_layers:
        raise SiteError(
            f"{what} names layer {layer}; this model has layers 0 to {n_layers - 1} (or "
            f"{-n_layers} to -1 from the end)"
        )
    return layer % n_layers


def _check_cache(backend: Backend, cache: Cache | None, keep: bool, partial: bool) -> None:
    if (cache is not None or keep) and Capability.CACHE not in backend.capabilities:
        raise CapabilityError(backend.why_lacking(Capability.CACHE))
    if keep and partial:
        raise ConfigError(
            "keep_cache=True needs every block to run: leave out start and stop_after"
        )


def _check_packed(
    backend: Backend,
    batch: TokenBatch,
    packed: Packed,
    cache: Cache | None,
    start: Start | None,
    edits: Sequence[Edit],
) -> None:
    if Capability.PACKED not in backend.capabilities:
        raise CapabilityError(backend.why_lacking(Capability.PACKED))
    tokens = sum(piece.size for piece in packed.pieces)
    if batch.ids.shape != (1, tokens) or start is None or cache is None:
        raise ConfigError(
            f"packed rows need one row of their {tokens} tokens, a start and a cache; this batch "
            f"is {list(batch.ids.shape)}"
        )
    n_rows, n_columns = cache.mask.shape
    for piece in packed.pieces:
        inside = all(0 <= row < n_rows for row in piece.rows)
        if not (inside and 0 <= piece.column <= n_columns and piece.width > 0):
            raise ConfigError(
                f"{piece} does not fit a cache of {n_rows} rows and {n_columns} columns; give rows "
                "from 0 on, a column that is stored, and at least one token"
            )
    if any(Site.parse(edit.site).pos_axis == 2 for edit in edits):
        raise CapabilityError("scores and patterns cannot be edited in packed rows; run them apart")


def _check_start(
    start: Start, batch: TokenBatch, backend: Backend, stop_after: int | None
) -> Start:
    layer = _layer(start.layer, backend.info.n_layers, "start")
    expected = (*batch.ids.shape, backend.info.d_model)
    if tuple(start.residual.shape) != expected:
        raise EditError(
            f"the start residual has shape {list(start.residual.shape)}; this batch needs "
            f"{list(expected)} (batch, padded positions, d_model)"
        )
    if stop_after is not None and stop_after < layer:
        raise SiteError(f"the run starts at block {layer} but stops after block {stop_after}")
    return Start(layer, start.residual)
