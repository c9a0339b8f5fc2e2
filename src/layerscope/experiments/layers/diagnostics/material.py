"""What the checks share: passes of the run, captured once, and the table they are compared with.

Memory: residuals of a few positions of every chosen pass, and their logits, within
`LayersConfig.batch_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.experiments.layers.diagnostics.onsets import recorded
from layerscope.experiments.layers.diagnostics.sections import Skipped
from layerscope.experiments.layers.diagnostics.settings import GRID, Settings
from layerscope.experiments.layers.diagnostics.splitting import variants_of
from layerscope.experiments.layers.prepare import BYTES_PER_VALUE, COPIES, PreparedPass
from layerscope.lenses.base import Lens
from layerscope.lenses.norm import NormLens
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.table import LayersTable
from layerscope.models import Capture, LanguageModel, TokenBatch
from layerscope.products import Products
from layerscope.readout import Readout, Reference, Request, readout

if TYPE_CHECKING:
    from layerscope.experiments.layers.run import Plan

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class States:
    """What a model computed at the last position of some passes.

    Attributes:
        residual: [pass, row, d_model] the residual of every row index, as it was computed.
        logits: [pass, vocab] of the model's own head, float32.
    """

    residual: Float[Tensor, "pass row d_model"]
    logits: Float[Tensor, "pass vocab"]


@dataclass(frozen=True, eq=False)
class Captured:
    """One forward pass over all chosen passes, at a grid of their positions.

    Attributes:
        residual: [pass, place, row, d_model].
        positions: [pass, place] position in the unpadded sequence; the last place is the last
            position, and positions of short prompts are repeated at the end.
        logits: [pass, vocab] of the model's own head at the last position, float32.
        attn_in: [pass, layer, d_model] what each block reads at the last position; None where the
            model does not show it.
        head_input: [pass, d_model] what the head unembeds there; None likewise.
    """

    residual: Float[Tensor, "pass place row d_model"]
    positions: Int[Tensor, "pass place"]
    logits: Float[Tensor, "pass vocab"]
    attn_in: Float[Tensor, "pass layer d_model"] | None
    head_input: Float[Tensor, "pass d_model"] | None

    @property
    def last(self) -> States:
        """The last positions alone."""
        return States(self.residual[:, -1], self.logits)


class Material:
    """A finished run, looked at again.

    Attributes:
        model: the model of the run.
        passes: the passes that are looked at: facts in their original wording first.
        left_out: how many passes of the run are not.
        text: a file of held-out text; None for the built-in one.
    """

    def __init__(
        self,
        planned: Plan,
        lenses: Mapping[str, Lens],
        table: LayersTable,
        settings: Settings,
        *,
        text: str | None = None,
    ) -> None:
        self.planned = planned
        self.model: LanguageModel = planned.model
        self.config = planned.config
        self.lenses = dict(lenses)
        self.table = table
        self.settings = settings
        self.text = text
        self.n_rows = self.model.n_layers + 1
        self._made: dict[str, Any] = {}
        self.passes, self.left_out = self._choose()

    def _choose(self) -> tuple[list[PreparedPass], int]:
        """Take facts in their original wording first, as many as memory and settings allow."""
        passes = [item for unit in self.planned.units for item in unit.passes]
        every = [item for item in passes if item.alignment.first_id is not None]
        ranked = sorted(
            every,
            key=lambda item: (item.source.prompt_id != "pos", item.source.variant != "orig"),
        )
        places = len(GRID) * self.n_rows + 2 * self.n_rows
        needed = (places * self.model.d_model * COPIES + self.model.d_vocab) * BYTES_PER_VALUE
        most = max(1, min(self.settings.passes, self.config.batch_bytes // needed))
        chosen = ranked[:most]
        return chosen, len(passes) - len(chosen)

    @property
    def scope(self) -> dict[str, Any]:
        """Which passes were looked at, for a section."""
        return {
            "prompt_indices": [item.source.index for item in self.passes],
            "passes_left_out": self.left_out,
        }

    @cached_property
    def norm(self) -> Lens:
        """The norm lens of the run's norm choice, whether or not the run has one."""
        return self.lenses.get("norm") or NormLens(self.model, choice=self.config.norm_choice)

    @cached_property
    def parts(self) -> dict[tuple[int, str], PassRows]:
        """The last-position rows of the table by (prompt_index, lens)."""
        return pass_rows(self.table)

    @cached_property
    def captured(self) -> Captured:
        """The one capture that all checks of the run's own arithmetic share."""
        pieces = [self._capture(group) for group in self.groups(self.passes)]
        attn = [piece.attn_in for piece in pieces if piece.attn_in is not None]
        head = [piece.head_input for piece in pieces if piece.head_input is not None]
        return Captured(
            torch.cat([piece.residual for piece in pieces]),
            torch.cat([piece.positions for piece in pieces]),
            torch.cat([piece.logits for piece in pieces]),
            torch.cat(attn) if attn else None,
            torch.cat(head) if head else None,
        )

    def once(self, name: str, make: Callable[[Material], T]) -> T:
        """Return what several checks need, made when the first of them asks for it."""
        if name not in self._made:
            self._made[name] = make(self)
        return self._made[name]

    def groups(self, passes: Sequence[PreparedPass]) -> list[list[PreparedPass]]:
        """Cut passes into the batches in which they run."""
        size = self.config.passes_per_batch
        return [list(passes[first : first + size]) for first in range(0, len(passes), size)]

    def _capture(self, passes: Sequence[PreparedPass]) -> Captured:
        positions = [grid_positions(item.length) for item in passes]
        sites = row_sites(self.model)
        available = {str(site) for site in self.model.sites()}
        attn = [f"attn_in.{layer}" for layer in range(self.model.n_layers)]
        attn = attn if available.issuperset(attn) else []
        head = ["final_norm"] if "final_norm" in available else []
        found = self.model.run(
            TokenBatch.from_ids([item.sequence[: item.length] for item in passes]),
            capture=Capture([*sites, *attn, *head], positions=positions, device=self.device),
            logits="last",
            products=self.config.run_products,
        )
        assert found.logits is not None
        return Captured(
            torch.stack([found[site] for site in sites], dim=2),
            torch.tensor(positions),
            found.logits[:, 0].to(self.device).float(),
            torch.stack([found[site][:, -1] for site in attn], dim=1) if attn else None,
            found[head[0]][:, -1] if head else None,
        )

    @property
    def device(self) -> torch.device:
        """Where the readout is: blocks may lie on several devices."""
        return self.model.unembedding.weight.device

    def states(
        self,
        passes: Sequence[PreparedPass],
        *,
        companions: Sequence[Sequence[int]] = (),
        model: LanguageModel | None = None,
        products: Products | None = None,
    ) -> States:
        """Run passes as one batch and return what their last positions hold.

        Args:
            passes: of the run.
            companions: token sequences that share the batch.
            model: another model than the run's.
            products: matrix products of the pass; None for those of the run.
        """
        model = model or self.model
        rows = [item.sequence[: item.length] for item in passes]
        found = model.run(
            TokenBatch.from_ids([*rows, *companions]),
            capture=Capture(row_sites(model), positions=-1, device=self.device),
            logits="last",
            products=products or self.config.run_products,
        )
        assert found.logits is not None
        residual = torch.stack([found[site][:, 0] for site in row_sites(model)], dim=1)
        n = len(passes)
        return States(residual[:n], found.logits[:n, 0].to(self.device).float())

    def through(self, lens: Lens, residual: Float[Tensor, "*place row d_model"]) -> Tensor:
        """Return what a lens unembeds, for all rows of all places: [place, row, d_model]."""
        flat = residual.flatten(0, -3)
        hidden = [lens.transform(flat[:, row], row) for row in range(flat.shape[1])]
        return torch.stack(hidden, dim=1)

    def read(
        self,
        hidden: Float[Tensor, "n d_model"],
        request: Request,
        *,
        tokens: Int[Tensor, "n n_tok"] | None = None,
        reference: Reference | None = None,
        against: Float[Tensor, "n d_model"] | None = None,
        model: LanguageModel | None = None,
    ) -> Readout:
        """Read hidden vectors with the run's readout settings."""
        return readout(
            hidden,
            (model or self.model).unembedding,
            request=self.fitting(request),
            reference=reference,
            against=against,
            tokens=tokens,
            products=self.config.products,
            budget_bytes=self.config.readout_bytes,
        )

    def fitting(self, request: Request) -> Request:
        """Return a request with no more most likely tokens than the vocabulary has."""
        return replace(request, top_k=min(request.top_k, self.model.d_vocab))

    def answers(self, passes: Sequence[PreparedPass]) -> Int[Tensor, " pass"]:
        """Return the first token of every answer."""
        return torch.tensor([answer_id(item) for item in passes])

    def describe(self, item: PreparedPass) -> dict[str, Any]:
        """Return the columns that name a pass in a section."""
        source = item.source
        return {
            "prompt_index": source.index,
            "fact_key": source.fact_key,
            "prompt_id": source.prompt_id,
            "prompt_variant": source.variant,
        }

    def part(self, item: PreparedPass, lens: str = "norm") -> PassRows:
        """Return a pass's rows in the table; raises Skipped where the run had no such lens."""
        found = self.parts.get((item.source.index, lens))
        if found is None:
            raise Skipped(f"the run has no {lens} lens; add it to lenses")
        return found

    def milestones(self, item: PreparedPass) -> dict[str, int | None]:
        """Return the milestones of a pass that the table records for the norm lens."""
        return recorded(self.part(item), self.config.measures, self.model.d_vocab)

    @cached_property
    def variants(self) -> dict[str, Lens]:
        """The parts of the tuned lens as lenses; empty without one."""
        return variants_of(self.model, self.lenses)[0]

    @property
    def variant_sources(self) -> dict[str, str]:
        """Where the variants that are fitted separately come from."""
        return variants_of(self.model, self.lenses)[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the residuals of one position while a batch is worked on."""
        return self.n_rows * self.model.d_model * COPIES * BYTES_PER_VALUE

    @property
    def low(self) -> bool:
        """Whether the model computes in half precision."""
        return self.model.dtype in (torch.float16, torch.bfloat16)


def answer_id(item: PreparedPass) -> int:
    """Return the first token of a pass's answer; the passes of a `Material` all have one."""
    found = item.alignment.first_id
    assert found is not None
    return found


def row_sites(model: LanguageModel) -> list[str]:
    """Return the sites of rows 0 to n_layers."""
    return ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers))]


def grid_positions(length: int) -> list[int]:
    """Return the grid of a prompt, each position once and the last repeated to the grid's size."""
    last = length - 1
    found = list(dict.fromkeys(round(fraction * last) for fraction in GRID))
    return found + [last] * (len(GRID) - len(found))
