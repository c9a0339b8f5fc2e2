"""Sweeps over pairs: which sites, at which positions, from which run into which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, LayerscopeError, PromptError, SiteError, nearest
from layerscope.interventions.patching.cells import Cell, Patch, site_of
from layerscope.interventions.patching.engine import run_cells
from layerscope.interventions.patching.metrics import Metric, Reader, metric_of
from layerscope.interventions.patching.pairs import Direction, Place, TokenPair, batch_of
from layerscope.interventions.patching.recording import Recording, record
from layerscope.interventions.patching.tiles import DEFAULT_BUDGET
from layerscope.models import LanguageModel, Site
from layerscope.products import Products

Where = Literal["each", "last", "all"]

# What users ask for, the site it is, and whether each unit is a cell of its own.
KINDS: dict[str, tuple[str, bool]] = {
    "resid_pre": ("resid_pre", False),
    "resid_mid": ("resid_mid", False),
    "resid_post": ("resid_post", False),
    "attn_in": ("attn_in", False),
    "attn_out": ("attn_out", False),
    "mlp_in": ("mlp_in", False),
    "mlp_out": ("mlp_out", False),
    "heads": ("attn.z", True),
    "q": ("attn.q", True),
    "k": ("attn.k", True),
    "v": ("attn.v", True),
    "pattern": ("attn.pattern", True),
    "neurons": ("mlp.post", True),
}


@dataclass(frozen=True)
class Node:
    """One thing to patch: a site, one unit of it or the whole, at a place or at all positions."""

    kind: str
    site: Site
    unit: int | None
    place: Place | None


@dataclass(frozen=True, eq=False)
class Values:
    """Metrics of the two runs of a pair, and of every node.

    Attributes:
        base: of the run that is patched, [metric]. donor: of the run that values come from.
        cells: [node, metric].
    """

    base: Float[Tensor, " metric"]
    donor: Float[Tensor, " metric"]
    cells: Float[Tensor, "node metric"]


def sites_of_kind(
    model: LanguageModel, kind: str, layers: Sequence[int] | None = None
) -> tuple[list[Site], bool]:
    """Return the sites of a kind by layer, and whether each unit is a cell of its own.

    Raises:
        SiteError: the kind is unknown, or no layer has it.
        CapabilityError: the model has it nowhere, or cannot edit it; says why.
    """
    if kind not in KINDS:
        raise SiteError(
            f"unknown kind of site '{kind}'{nearest(kind, KINDS)}; available: {', '.join(KINDS)}"
        )
    name, units = KINDS[kind]
    sites: list[Site] = []
    refusal: LayerscopeError | None = None
    for layer in range(model.n_layers) if layers is None else layers:
        try:
            sites.append(site_of(model, Site(name, layer)))
        except LayerscopeError as error:
            if isinstance(error, SiteError):
                raise
            refusal = error
    if not sites:
        raise refusal or SiteError(f"there is no layer to patch '{kind}' in; give at least one")
    return sites, units


def nodes_of(
    model: LanguageModel,
    pair: TokenPair,
    kind: str,
    *,
    where: Where = "each",
    layers: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
) -> list[Node]:
    """Return the nodes of a sweep of one kind over a pair.

    Args:
        kind: "resid_pre", "attn_out", "heads", "neurons", ...: a key of `KINDS`.
        where: "each" place for itself, the "last" token alone, or "all" positions at once.
        units: heads or neurons; None for every one.

    Raises:
        PromptError: "all" positions of prompts that differ in length, or a pattern of those.
    """
    sites, by_unit = sites_of_kind(model, kind, layers)
    if where not in ("each", "last", "all"):
        raise ConfigError(f"positions={where!r}; use 'each', 'last' or 'all'")
    if not pair.aligned and (where == "all" or kind == "pattern"):
        raise PromptError(
            f"pair '{pair.pair.key}': {kind} at {'all' if where == 'all' else 'these'} positions "
            "needs prompts with the same number of tokens; patch each labelled place instead"
        )
    last = Place("last", len(pair.clean) - 1, len(pair.corrupt) - 1)
    places: list[Place | None] = list(pair.places)
    if where != "each":
        places = [None] if where == "all" else [last]
    nodes: list[Node] = []
    for site in sites:
        chosen: Iterable[int | None] = (None,)
        if by_unit:
            n_units = model.backend.trailing(site, pair_width(pair))[0]
            chosen = range(n_units) if units is None else units
        nodes += [Node(kind, site, unit, place) for unit in chosen for place in places]
    return nodes


def pair_width(pair: TokenPair) -> int:
    """Return the tokens of the longer prompt."""
    return max(len(pair.clean), len(pair.corrupt))


def sweep(
    model: LanguageModel,
    pair: TokenPair,
    nodes: Sequence[Node],
    metrics: Sequence[str | Metric] = ("logit_diff",),
    *,
    direction: Direction = "denoise",
    products: Products = "default",
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Values:
    """Patch every node of a pair by itself, and return the metrics.

    Args:
        direction: "denoise" puts values of the clean run into the corrupt one, "noise" the other
            way about.
        budget: bytes that a batch of cells may take.

    Raises:
        ConfigError: an unknown metric or direction, or a metric that lacks its foils.
    """
    runs = record_pair(model, pair, nodes, direction=direction, products=products)
    reader = runs.reader(tuple(metric_of(metric) for metric in metrics))
    cells = [runs.cell(node) for node in nodes]
    ends = torch.stack([runs.base.final[runs.base_row], runs.donor.final[runs.donor_row]])
    # Both ends answer for the row that is patched: the same answers, the same reference.
    both = reader(ends, [runs.base_row] * 2)
    # What comes before the first difference is the same in both runs: such cells change nothing.
    live = [at for at, node in enumerate(nodes) if not _idle(node, pair)]
    results = both[:1].expand(len(nodes), -1).clone()
    if live:
        results[live] = run_cells(
            runs.base, [cells[at] for at in live], reader, budget=budget, progress=progress
        )
    if progress is not None and len(live) < len(nodes):
        progress(len(nodes) - len(live))
    return Values(both[0], both[1], results)


def _idle(node: Node, pair: TokenPair) -> bool:
    place = node.place
    return place is not None and place.clean == place.corrupt and place.clean < pair.same


@dataclass(frozen=True, eq=False)
class Runs:
    """Both runs of a pair; one recording where the prompts are of one length."""

    model: LanguageModel
    pair: TokenPair
    direction: Direction
    base: Recording
    base_row: int
    donor: Recording
    donor_row: int
    clean: Float[Tensor, " d_model"]
    products: Products

    def reader(self, metrics: tuple[Metric, ...]) -> Reader:
        """Return what reads metrics of cells in the patched run."""
        n_rows = len(self.base)
        return Reader(
            self.model,
            metrics,
            (self.pair.targets,) * n_rows,
            self.clean.expand(n_rows, -1),
            self.products,
        )

    def columns(self, place: Place | None) -> tuple[list[int], list[int]]:
        """Return the positions of a place in the patched run and in the donor."""
        if place is None:
            columns = list(range(self.base.n_columns))
            return columns, columns
        ends = (place.clean, place.corrupt)
        base, donor = ends[::-1] if self.direction == "denoise" else ends
        return [base], [donor]

    def cell(self, node: Node) -> Cell:
        """Return the cell that puts the donor's value of a node into the patched run."""
        base, donor = self.columns(node.place)
        value = self.donor.value(node.site)[self.donor_row, donor[0] : donor[-1] + 1]
        if node.unit is not None:
            value = value[:, node.unit]
        return Cell((Patch(node.site, tuple(base), value, node.unit),), self.base_row)


def record_pair(
    model: LanguageModel,
    pair: TokenPair,
    nodes: Sequence[Node],
    *,
    direction: Direction = "denoise",
    products: Products = "default",
) -> Runs:
    """Run both prompts of a pair and keep what the nodes need."""
    if direction not in ("denoise", "noise"):
        raise ConfigError(f"direction={direction!r}; use 'denoise' or 'noise'")
    sites = list(dict.fromkeys(str(node.site) for node in nodes))
    into, out_of = 1, 0  # the rows: clean, corrupt
    if direction == "noise":
        into, out_of = out_of, into
    if pair.aligned:
        both = record(model, batch_of([pair.clean, pair.corrupt]), capture=sites, products=products)
        return Runs(model, pair, direction, both, into, both, out_of, both.final[0], products)
    clean = record(
        model, batch_of([pair.clean]), capture=sites if out_of == 0 else (), products=products
    )
    corrupt = record(
        model, batch_of([pair.corrupt]), capture=sites if out_of == 1 else (), products=products
    )
    runs = (clean, corrupt)
    return Runs(model, pair, direction, runs[into], 0, runs[out_of], 0, clean.final[0], products)
