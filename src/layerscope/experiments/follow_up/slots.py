"""The answer slot: what prompts hold at their last token, and what patches there do.

Prompts of one length share a recording, and every patch of them is a cell of the patching engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.interventions.patching import Cell, Patch, Recording, record, run_cells
from layerscope.models import Capture, LanguageModel, Site, TokenBatch
from layerscope.products import Products
from layerscope.products import products as matrix_products

# Logits held at once, in bytes.
_LOGITS_BYTES = 64 * 2**20
_PROMPTS_PER_PASS = 32
_LN2 = 0.6931471805599453

Patches = tuple[Patch, ...]


@dataclass(frozen=True)
class Slot:
    """A prompt that ends where its answer begins.

    Attributes:
        key: of its item.
        ids: all tokens, special ones included.
        answer: first token of the right answer; foil: of the wrong one, None without.
    """

    key: str
    ids: tuple[int, ...]
    answer: int
    foil: int | None = None

    def content(self) -> list[object]:
        """Return what decides its results, JSON-able."""
        return [self.key, list(self.ids), self.answer, self.foil]


class Seen(NamedTuple):
    """What one pass says at the slot.

    Attributes:
        logit_diff: answer's logit less the foil's; None without a foil.
        log2p: of the answer. rank: 1 + tokens with a larger logit.
        moved: sum of |change of probability| over the watched tokens, against the plain pass.
    """

    logit_diff: float | None
    log2p: float
    rank: int
    moved: float


@dataclass(frozen=True)
class Result:
    """A prompt's plain pass, and its cells."""

    plain: Seen
    cells: list[Seen]


Make = Callable[[int, Recording, int], Sequence[Patches]]
"""Given a prompt's number, its recording and its row there: the cells to run on it."""


def patch(site: Site, value: Float[Tensor, "*unit"], at: int, unit: int | None = None) -> Patch:
    """Return a patch of one position."""
    return Patch(site, (at,), value[None], unit)


def values_at(
    model: LanguageModel,
    slots: Sequence[Slot],
    sites: Sequence[Site],
    *,
    products: Products = "default",
) -> dict[Site, Tensor]:
    """Return what sites hold at the last token of every prompt, [prompt, ...]."""
    found: dict[Site, list[Tensor]] = defaultdict(list)
    for begin in range(0, len(slots), _PROMPTS_PER_PASS):
        batch = TokenBatch.from_ids(
            [slot.ids for slot in slots[begin : begin + _PROMPTS_PER_PASS]], padding_side="right"
        )
        result = model.run(
            batch, capture=Capture(list(sites), positions=-1), logits=None, products=products
        )
        for site in sites:
            found[site].append(result[site][:, 0].clone())
    return {site: torch.cat(parts) for site, parts in found.items()}


def run_at(
    model: LanguageModel,
    slots: Sequence[Slot],
    make: Make,
    *,
    capture: Sequence[Site] = (),
    top: int = 0,
    products: Products = "default",
) -> list[Result]:
    """Run every prompt plainly and with its cells, in order.

    Args:
        make: says which cells; see `Make`.
        capture: sites that `make` reads from the recording, beside the residuals.
        top: tokens that `Seen.moved` watches, the answer left out.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, slot in enumerate(slots):
        by_length[len(slot.ids)].append(number)
    found: dict[int, Result] = {}
    for numbers in by_length.values():
        for begin in range(0, len(numbers), _PROMPTS_PER_PASS):
            chosen = numbers[begin : begin + _PROMPTS_PER_PASS]
            some = [slots[number] for number in chosen]
            recording = record(
                model,
                TokenBatch.from_ids([slot.ids for slot in some], padding_side="right"),
                capture=list(capture),
                products=products,
            )
            cells: list[Cell] = []
            counts: list[int] = []
            for row, number in enumerate(chosen):
                made = make(number, recording, row)
                cells += [Cell(patches, row) for patches in made]
                counts.append(len(made))
            reader = _Reader(model, some, recording.final, top, products)
            plain = reader(recording.final, range(len(some)))
            values = run_cells(recording, cells, reader) if cells else plain[:0]
            parts = values.split(counts)
            for row, number in enumerate(chosen):
                has_foil = slots[number].foil is not None
                found[number] = Result(
                    _seen(plain[row], has_foil), [_seen(value, has_foil) for value in parts[row]]
                )
    return [found[number] for number in range(len(slots))]


class _Reader:
    """Reads (logit difference, log2 probability, rank, moved mass) of cells, in float64."""

    def __init__(
        self,
        model: LanguageModel,
        slots: Sequence[Slot],
        plain: Float[Tensor, "row d_model"],
        top: int,
        products: Products,
    ) -> None:
        self.model = model
        self.products: Products = products
        device = model.unembedding.weight.device
        self.answers = torch.tensor([slot.answer for slot in slots], device=device)
        foils = [slot.answer if slot.foil is None else slot.foil for slot in slots]
        self.foils = torch.tensor(foils, device=device)
        self.watched: Int[Tensor, "row top"] | None = None
        if top:
            _, capped = self._logits(plain)
            count = min(top + 1, capped.shape[1])
            ids = capped.topk(count, dim=1).indices
            # The answer is not among the others; where it is not on top, the last one is left out.
            others = ids != self.answers[:, None]
            others[others.all(dim=1), -1] = False
            self.watched = ids[others].view(len(slots), count - 1)
            self.before = capped.double().log_softmax(-1).gather(1, self.watched).exp()

    def __call__(
        self, final: Float[Tensor, "cell d_model"], rows: Sequence[int]
    ) -> Float[Tensor, "cell figure"]:
        own = torch.tensor(list(rows), device=self.answers.device)
        step = max(_LOGITS_BYTES // (8 * self.model.d_vocab), 1)
        parts = [
            self._read(final[begin : begin + step], own[begin : begin + step])
            for begin in range(0, len(own), step)
        ]
        return torch.cat(parts)

    def _read(self, final: Tensor, rows: Tensor) -> Float[Tensor, "cell figure"]:
        ranked, capped = self._logits(final)
        answers, foils = self.answers[rows][:, None], self.foils[rows][:, None]
        rank = 1 + (ranked > ranked.gather(1, answers)).sum(1)  # before a cap, which makes ties
        logits = capped.double()
        log_p = logits.log_softmax(-1)
        moved = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
        if self.watched is not None:
            now = log_p.gather(1, self.watched[rows]).exp()
            moved = (now - self.before[rows]).abs().sum(1)
        diff = (logits.gather(1, answers) - logits.gather(1, foils))[:, 0]
        columns = [diff, log_p.gather(1, answers)[:, 0] / _LN2, rank.double(), moved]
        return torch.stack(columns, dim=1).cpu()

    def _logits(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits before and after the head's cap."""
        head = self.model.unembedding
        dtype = torch.promote_types(final.dtype, torch.float32)
        with torch.no_grad(), matrix_products(self.products, device=head.weight.device):
            hidden = final.detach().to(head.weight.device, dtype)
            z = head.shift(hidden @ head.weight.detach().to(dtype).T)
        return z, z if head.softcap is None else head.cap(z.clone())


def _seen(values: Float[Tensor, " figure"], has_foil: bool) -> Seen:
    diff, log2p, rank, moved = values.tolist()
    return Seen(diff if has_foil else None, log2p, int(rank), moved)
