"""Gradients of many quantities pulled back through one block at a time.

All cotangents share one forward pass of the block: n of them cost n backward passes over
activations and nothing else. A quantity that reads one row right above the block costs less still:
what its position alone computes (MLP, output projection, norms) is pulled back for that one row,
and only what attention mixed for all rows. What is live in a pass is the variant's choice:

- ``total``: everything. What happens to the target if the source is nudged.
- ``frozen``: attention patterns and the scales of norms are held at their values (see `held`).
- ``linear``: frozen, and the MLPs' outputs are constants; the target is then affine in its sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError, ConfigError, nearest
from layerscope.features.pathways.held import HeldBlocks
from layerscope.features.pathways.state import PromptState
from layerscope.models import (
    Apply,
    Edit,
    EditContext,
    Replace,
    Site,
    Start,
    TokenBatch,
)
from layerscope.models.batched_gradients import KEPT, pull_back

Variant = Literal["total", "frozen", "linear"]
VARIANTS: tuple[str, ...] = get_args(Variant)
GRAPH_BYTES = 2**26  # of forward passes that are kept for several blocks
_SAME = 1e-5  # two ways to compute a block differ by rounding: this, or the root of the dtype's


class Pullback:
    """Pulls cotangents of a prompt's residuals back from row to row.

    Args:
        state: the prompt.
        variant: what is live.
        n_positions: only so many first positions take part: nothing later can drive a target.
        chunk: cotangents of one backward pass.
        lowest: no block below it will be crossed.

    Raises:
        ConfigError: the variant is unknown.
    """

    def __init__(
        self,
        state: PromptState,
        *,
        variant: Variant = "total",
        n_positions: int,
        chunk: int = 64,
        lowest: int = 0,
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(
                f"unknown variant '{variant}'{nearest(variant, VARIANTS)}; use "
                f"{', '.join(VARIANTS)}"
            )
        self.state, self.variant, self.chunk = state, variant, chunk
        ids = state.batch.ids[:, :n_positions]
        self.batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (n_positions,))
        self.n_positions = n_positions
        self.model = state.model
        self.held = HeldBlocks(state.model, self.batch, state.residuals[:, :n_positions])
        self._lowest = lowest
        self._graphs: dict[int, _Graph] = {}

    def through(
        self,
        block: int,
        cotangents: Float[Tensor, "target pos d_model"],
        reads: Float[Tensor, "more d_model"] | None = None,
        positions: Sequence[int] = (),
    ) -> Float[Tensor, "all_targets pos d_model"]:
        """Return cotangents of row `block`, given those of row ``block + 1``.

        Args:
            block: the block to cross.
            cotangents: of row ``block + 1``.
            reads: further cotangents of that row, each zero but at one position; they come last.
            positions: of `reads`.

        Raises:
            CapabilityError: the target does not depend on the source: something cuts the graph.
        """
        with torch.enable_grad():
            graph = self._graph(block)
            if not graph.above.requires_grad:
                raise CapabilityError(
                    f"block {block} passes no gradient: the target does not depend on the source "
                    "here; something in the model runs under no_grad or detaches"
                )
            alone = None
            if reads is not None and positions and graph.cut is not None:
                alone = self._alone(block, graph.cut.given.detach(), reads, positions)
            if reads is not None and alone is None:
                cotangents = torch.cat([cotangents, self._spread(reads, positions)])
            if alone is None:
                parts = (part for part in cotangents.split(self.chunk) if len(part))
                found = [graph.back(part).to(cotangents.dtype) for part in parts]
            else:
                found = list(self._joined(graph, cotangents, alone, positions))
        return torch.cat(found) if found else cotangents

    def _spread(
        self, rows: Float[Tensor, "target ..."], positions: Sequence[int]
    ) -> Float[Tensor, "target pos ..."]:
        """Return zeros with each row at its position."""
        found = rows.new_zeros((len(rows), self.n_positions, *rows.shape[1:]))
        found[torch.arange(len(rows)), list(positions)] = rows
        return found

    def _apart(self, block: int) -> bool:
        """Whether a block can be run on single rows, what attention mixes for them being given."""
        mixed, backend = Site("attn.z", block), self.model.backend
        known = backend.why_not(mixed) is None and backend.why_not_edit(mixed) is None
        return self.variant == "total" and known

    def _alone(
        self,
        block: int,
        mixed: Float[Tensor, "1 pos head d_head"],
        reads: Float[Tensor, "target d_model"],
        positions: Sequence[int],
    ) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, "target head d_head"]] | None:
        """Return gradients of the row below and of what attention mixed for it, a row per target.

        The rows are packed into batches of the prompt's length, where they see nothing of each
        other; None where they do, which shows in values that are not those of the prompt.
        """
        residuals, found = self.state.residuals, list[tuple[Tensor, Tensor]]()
        for first in range(0, len(reads), self.chunk * self.n_positions):
            read = reads[first : first + self.chunk * self.n_positions]
            at = torch.tensor(list(positions[first : first + len(read)]))
            # Batches as long as the prompt at most; the last row fills up where some lack one.
            n_batches = -(-len(at) // self.n_positions)
            filled = torch.arange(n_batches * -(-len(at) // n_batches)).clamp_max(len(at) - 1)
            where = at[filled].view(n_batches, -1)
            below = residuals[block][where].detach().requires_grad_(True)
            given = mixed[0][where].detach().requires_grad_(True)
            ids = self.batch.ids[0][where]
            batch = TokenBatch(
                ids, torch.ones_like(ids, dtype=torch.bool), (ids.shape[1],) * n_batches
            )
            site = f"resid_post.{block}"
            result = self.model.run(
                batch,
                start=Start(block, below),
                stop_after=block,
                capture=site,
                edits=[Replace(Site("attn.z", block), given)],
                logits=None,
                gradients=True,
            )
            above = result[site].flatten(0, 1)[: len(at)]
            if not _same(above, residuals[block + 1][at], residuals[block][at]):
                return None
            own, others = torch.autograd.grad(above, (below, given), read.to(above.dtype))
            found.append((own.flatten(0, 1)[: len(at)], others.flatten(0, 1)[: len(at)]))
        return torch.cat([own for own, _ in found]), torch.cat([others for _, others in found])

    def _joined(
        self,
        graph: _Graph,
        cotangents: Float[Tensor, "target pos d_model"],
        alone: tuple[Float[Tensor, "more d_model"], Float[Tensor, "more head d_head"]],
        positions: Sequence[int],
    ) -> Iterator[Float[Tensor, "part pos d_model"]]:
        """Pull cotangents back, and with them what attention mixed for single rows."""
        n_old, n_all = len(cotangents), len(cotangents) + len(positions)
        for first in range(0, n_all, self.chunk):
            old = cotangents[first : first + self.chunk]
            new = slice(max(first - n_old, 0), max(first + self.chunk - n_old, 0))
            at = list(positions[new])
            pulled = graph.back(old, self._spread(alone[1][new], at)).to(cotangents.dtype)
            pulled[torch.arange(len(old), len(pulled)), at] += alone[0][new].to(pulled.dtype)
            yield pulled

    def block(
        self, block: int, below: Float[Tensor, "1 pos d_model"]
    ) -> Float[Tensor, "1 pos d_model"]:
        """Return the residual after a block from the one before it, as the variant has it."""
        live = self.variant == "total"
        edits = [] if live else self.held.edits(block, below, self.variant)
        return self._run(block, block, below, edits)

    def _run(self, first: int, last: int, below: Tensor, edits: Sequence[Edit]) -> Tensor:
        site = f"resid_post.{last}"
        result = self.model.run(
            self.batch,
            start=Start(first, below),
            stop_after=last,
            capture=site,
            edits=edits,
            logits=None,
            gradients="batched",
        )
        return result[site]

    def _graph(self, block: int) -> _Graph:
        """Return a block's forward pass, and run with it as many below it as memory allows."""
        if self.variant != "total":
            below = self._leaf(block)
            return _Graph(below, self.block(block, below))
        if block not in self._graphs:
            self._graphs = self._run_together(block)
        return self._graphs.pop(block)

    def _leaf(self, block: int) -> Float[Tensor, "1 pos d_model"]:
        below = self.state.residuals[block : block + 1, : self.n_positions]
        return below.detach().clone().requires_grad_(True)

    def _run_together(self, last: int) -> dict[int, _Graph]:
        """Run blocks in one pass, each from the prompt's own residual."""
        kept = self.n_positions * KEPT * self.model.d_model * self.model.dtype.itemsize
        first = max(self._lowest, last + 1 - max(1, GRAPH_BYTES // kept), 0)
        leaves = {block: self._leaf(block) for block in range(first, last + 1)}
        entered = {block: _Cut(leaves[block]) for block in range(first + 1, last + 1)}
        mixed = {block: _Cut() for block in leaves if self._apart(block)}
        edits = [Apply(f"resid_pre.{block}", cut) for block, cut in entered.items()]
        edits += [Apply(Site("attn.z", block), cut) for block, cut in mixed.items()]
        top = self._run(first, last, leaves[first], edits)
        found: dict[int, _Graph] = {}
        for block, below in leaves.items():
            above = top if block == last else entered[block + 1].found
            inner = mixed.get(block)
            # Without a gradient it is a constant, and above is what depends on its leaf alone.
            passes = inner is not None and inner.found.requires_grad
            found[block] = _Graph(below, above, inner if passes else None)
        return found


class _Cut:
    """An edit that ends gradients at a site, where they can be pulled back further later.

    Attributes:
        found: what the site held. given: a leaf that it holds now, of the same value unless given.
    """

    found: Tensor
    given: Tensor

    def __init__(self, given: Tensor | None = None) -> None:
        self._given = given

    def __call__(self, values: Tensor, _context: EditContext) -> Tensor:
        self.found = values
        self.given = values.detach().requires_grad_(True) if self._given is None else self._given
        return self.given


@dataclass(frozen=True, eq=False)
class _Graph:
    """A block's forward pass, kept for its backward passes.

    Attributes:
        below: leaf that enters the block. above: what leaves it.
        cut: what its attention mixed, where that is a leaf for what follows.
    """

    below: Float[Tensor, "1 pos d_model"]
    above: Float[Tensor, "1 pos d_model"]
    cut: _Cut | None = None

    def back(
        self,
        cotangents: Float[Tensor, "target pos d_model"],
        mixed: Float[Tensor, "more pos head d_head"] | None = None,
    ) -> Float[Tensor, "all_targets pos d_model"]:
        """Pull cotangents of what leaves the block back, and further ones of what is mixed."""
        given = cotangents[:, None].to(self.above.dtype)
        if self.cut is None:
            return pull_back(self.above, [self.below], given)[0][:, 0]
        others = [] if mixed is None else [mixed[:, None]]
        own = None
        if len(given):
            own, inner = pull_back(self.above, [self.below, self.cut.given], given)
            others.insert(0, inner)
        (pulled,) = pull_back(self.cut.found, [self.below], torch.cat(others))
        if own is not None:
            pulled[: len(own)] += own
        return pulled[:, 0]


def _same(
    found: Float[Tensor, "row d_model"],
    expected: Float[Tensor, "row d_model"],
    before: Float[Tensor, "row d_model"],
) -> bool:
    """Whether rows are what a block made of `before`, up to rounding of what it wrote."""
    written = (expected - before).float().abs().mean()
    bound = max(_SAME, torch.finfo(found.dtype).eps ** 0.5)
    return bool((found.detach() - expected).float().abs().mean() <= bound * written)
