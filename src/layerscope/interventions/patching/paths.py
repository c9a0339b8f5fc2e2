"""Path patching: what a sender says to one receiver, by the direct path between the two.

Wang et al., Interpretability in the Wild, 2022, appendix B; Goldowsky-Dill et al., Localizing Model
Behavior with Path Patching, 2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, SiteError
from layerscope.interventions.patching.cells import Cell, Patch, site_of
from layerscope.interventions.patching.climbs import edit_of
from layerscope.interventions.patching.engine import Read, run_cells
from layerscope.interventions.patching.pairs import batch_of
from layerscope.interventions.patching.recording import Recording, record
from layerscope.interventions.patching.tiles import DEFAULT_BUDGET
from layerscope.models import LanguageModel, Site, Start
from layerscope.products import Products

Part = Literal["embed", "head", "attn", "mlp"]
Input = Literal["q", "k", "v", "mlp", "attn", "logits"]


@dataclass(frozen=True)
class Sender:
    """What writes to the stream: the embedding, a head, a whole attention layer, or an MLP."""

    part: Part
    layer: int = 0
    head: int | None = None

    def __str__(self) -> str:
        """Return its name."""
        if self.part == "embed":
            return "embed"
        return f"{self.layer}.{self.head}" if self.part == "head" else f"{self.part}.{self.layer}"

    @property
    def depth(self) -> int:
        """Its place in the order in which a sequential model writes to the stream."""
        return -1 if self.part == "embed" else 2 * self.layer + (self.part == "mlp")


@dataclass(frozen=True)
class Receiver:
    """What reads the stream: a head's queries, keys or values, a sublayer, or the logits.

    Attributes:
        head: query head for "q"; key-value head for "k" and "v", which all query heads of its group
            read; None for every head.
    """

    input: Input
    layer: int = 0
    head: int | None = None

    def __str__(self) -> str:
        """Return its name."""
        if self.input == "logits":
            return "logits"
        head = "" if self.head is None else f".{self.head}"
        return f"{self.layer}{head}.{self.input}"

    def depth(self, n_layers: int) -> int:
        """Its place in the order in which a sequential model reads the stream."""
        if self.input == "logits":
            return 2 * n_layers
        return 2 * self.layer + (self.input == "mlp")


@dataclass(frozen=True)
class Edge:
    """A sender and a receiver above it."""

    sender: Sender
    receiver: Receiver


def senders_of(model: LanguageModel, *, heads: bool = True) -> list[Sender]:
    """Return everything that writes to the stream, in order."""
    found = [Sender("embed")]
    for layer in range(model.n_layers):
        if not heads:
            found.append(Sender("attn", layer))
        elif model.backend.why_not(Site("attn.z", layer)) is None:
            found += [Sender("head", layer, head) for head in range(model.n_heads)]
        found.append(Sender("mlp", layer))
    return found


def edges_of(
    model: LanguageModel, senders: Sequence[Sender], receivers: Sequence[Receiver]
) -> list[Edge]:
    """Return the edges that lead upwards."""
    return [
        Edge(sender, receiver)
        for receiver in receivers
        for sender in senders
        if reaches(model, sender, receiver)
    ]


def reaches(model: LanguageModel, sender: Sender, receiver: Receiver) -> bool:
    """Return whether a sender writes before a receiver reads."""
    if receiver.input == "logits" or sender.part == "embed":
        return True
    if model.backend.why_not(Site("resid_mid", receiver.layer)) is not None:
        return sender.layer < receiver.layer  # parallel: both sublayers read what the block reads
    return sender.depth < receiver.depth(model.n_layers)


def record_for_paths(
    model: LanguageModel,
    ids: Tensor,
    senders: Sequence[Sender],
    *,
    products: Products = "default",
) -> Recording:
    """Run rows of one length and keep what path patching between them needs."""
    sites: dict[str, None] = {}
    for layer in range(model.n_layers):
        for kind in ("attn_out", "mlp_out", "resid_mid", "resid_post"):
            if model.backend.why_not(Site(kind, layer)) is None:
                sites[str(Site(kind, layer))] = None
    for sender in senders:
        if sender.part == "head":
            sites[str(Site("attn.z", sender.layer))] = None
    return record(model, ids, capture=list(sites), products=products)


def run_paths(
    runs: Recording,
    edges: Sequence[Edge],
    read: Read,
    *,
    base_row: int,
    donor_row: int,
    positions: Sequence[int] | None = None,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return what `read` says of every edge alone being patched.

    The sender's output is the donor's, and only the receiver's input sees the difference: every
    other sender keeps the output of the base run. The difference enters the receiver through its
    norm, computed anew; everything above the receiver is computed as ever.

    Args:
        runs: of `record_for_paths`, holding both rows.
        positions: of the sender's difference; None for all.

    Raises:
        SiteError: an edge leads downwards, or its sender or receiver is not in this model.
    """
    model = runs.model
    for edge in edges:
        if not reaches(model, edge.sender, edge.receiver):
            raise SiteError(
                f"{edge.sender} writes after {edge.receiver} has read; choose a receiver above it"
            )
    said = {
        sender: said_by(runs, sender, base_row, donor_row, positions)
        for sender in dict.fromkeys(edge.sender for edge in edges)
    }
    results: list[Tensor | None] = [None] * len(edges)
    groups: dict[tuple[Input, int], list[int]] = defaultdict(list)
    for at, edge in enumerate(edges):
        receiver = edge.receiver
        groups[receiver.input, -1 if receiver.input == "logits" else receiver.layer].append(at)
    cells: list[tuple[int, Cell]] = []
    for (kind, layer), places in groups.items():
        width = max(budget // (8 * runs.n_columns * model.d_model * model.dtype.itemsize), 1)
        for begin in range(0, len(places), width):
            chosen = places[begin : begin + width]
            shifts = torch.stack([said[edges[at].sender] for at in chosen])
            if kind == "logits":
                final = _read_end(runs, shifts[:, -1:], base_row)
                values = read(final, [base_row] * len(chosen))
                for at, value in zip(chosen, values, strict=True):
                    results[at] = value
                if progress is not None:
                    progress(len(chosen))
                continue
            heard = _heard(runs, kind, layer, shifts, base_row)
            for at, value in zip(chosen, heard, strict=True):
                unit = edges[at].receiver.head
                site = Site(_SITES[kind], layer)
                part = value if unit is None else value[:, unit]
                columns = tuple(range(runs.n_columns))
                cells.append((at, Cell((Patch(site, columns, part, unit),), base_row)))
    if cells:
        only = [cell for _, cell in cells]
        values = run_cells(runs, only, read, budget=budget, progress=progress)
        for (at, _), value in zip(cells, values, strict=True):
            results[at] = value
    return torch.stack([value for value in results if value is not None])


_SITES: dict[Input, str] = {
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "mlp": "mlp_out",
    "attn": "attn_out",
}


def said_by(
    runs: Recording,
    sender: Sender,
    base_row: int,
    donor_row: int,
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "pos d_model"]:
    """Return what the donor's output of a sender would add to the base run's stream."""
    model = runs.model
    if sender.part == "embed":
        stored = runs.residuals[0]
        shift = stored[donor_row] - stored[base_row]
    elif sender.part in ("attn", "mlp"):
        stored = runs.value(Site(f"{sender.part}_out", sender.layer))
        shift = stored[donor_row] - stored[base_row]
    else:
        shift = _head_shift(runs, sender, base_row, donor_row)
    if positions is not None:
        kept = torch.zeros_like(shift)
        kept[list(positions)] = shift[list(positions)]
        shift = kept
    if shift.shape != (runs.n_columns, model.d_model):
        raise ConfigError(f"the sender {sender} does not write to the stream")
    return shift


def _head_shift(
    runs: Recording, sender: Sender, base_row: int, donor_row: int
) -> Float[Tensor, "pos d_model"]:
    """Return how the layer's contribution changes with one head: through a norm, where there is."""
    if sender.head is None:
        raise SiteError("a sending head needs its number; use Sender('head', layer, head)")
    layer = sender.layer
    site, out = site_of(runs.model, Site("attn.z", layer)), Site("attn_out", layer)
    value = runs.value(site)[donor_row, :, sender.head]
    patch = Patch(site, tuple(range(runs.n_columns)), value, sender.head)
    left = _one_block(runs, layer, runs.residuals[layer][base_row][None], out, [(0, patch)])
    return left[0] - runs.value(out)[base_row]


def _heard(
    runs: Recording,
    kind: Input,
    layer: int,
    shifts: Float[Tensor, "edge pos d_model"],
    base_row: int,
) -> Tensor:
    """Return what a receiver computes from the base run's stream with each shift added."""
    site = site_of(runs.model, Site(_SITES[kind], layer))
    base = runs.residuals[layer][base_row]
    mid = Site("resid_mid", layer)
    if kind != "mlp" or runs.model.backend.why_not(mid) is not None:
        return _one_block(runs, layer, base + shifts, site)
    # The MLP reads the stream after attention, which must not see the shift.
    stream = runs.value(mid)[base_row] + shifts
    columns = tuple(range(runs.n_columns))
    patches = [(row, Patch(mid, columns, own)) for row, own in enumerate(stream)]
    return _one_block(runs, layer, base.expand(len(stream), -1, -1).clone(), site, patches)


def _one_block(
    runs: Recording,
    layer: int,
    residual: Float[Tensor, "row pos d_model"],
    site: Site,
    patches: Sequence[tuple[int, Patch]] = (),
) -> Tensor:
    """Return what a site of one block holds when the block reads a given residual.

    All patches are of one site.
    """
    # The ids only count the tokens: the residual is given.
    batch = batch_of(runs.batch.ids[:1].expand(residual.shape[0], -1).tolist())
    return runs.model.run(
        batch,
        start=Start(layer, residual),
        stop_after=layer,
        capture=site,
        edits=[edit_of(patches[0][1].site, patches)] if patches else (),
        logits=None,
        products=runs.products,
    )[site]


def _read_end(
    runs: Recording, shifts: Float[Tensor, "edge 1 d_model"], base_row: int
) -> Float[Tensor, "edge d_model"]:
    """Return what is unembedded when the last residual is shifted."""
    model = runs.model
    last = Site("resid_post", model.n_layers - 1)
    stream = runs.value(last)[base_row, -1] + shifts[:, 0]
    _, norm = model.backend.norm_at(model.n_layers, "final")
    with torch.no_grad():
        return norm(stream)
