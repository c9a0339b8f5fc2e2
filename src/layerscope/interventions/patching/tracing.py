"""Causal tracing: noise on a subject's embeddings, and which clean states bring the answer back.

Meng et al., Locating and Editing Factual Associations in GPT, 2022, section 2 and appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, PromptError
from layerscope.interventions.patching.cells import Cell, Patch, site_of
from layerscope.interventions.patching.engine import run_cells
from layerscope.interventions.patching.metrics import Metric, Reader, Targets, metric_of
from layerscope.interventions.patching.pairs import batch_of
from layerscope.interventions.patching.recording import Recording, record
from layerscope.interventions.patching.tiles import DEFAULT_BUDGET
from layerscope.models import Add, LanguageModel, Site
from layerscope.products import Products

Restore = Literal["state", "mlp", "attn"]
RESTORED: dict[Restore, str] = {"state": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
NOISE_FACTOR = 3.0
SEEDS = 10
WINDOW = 10


@dataclass(frozen=True)
class Subject:
    """A prompt with the positions of its subject, and the token that answers it.

    Attributes:
        ids: of the prompt. positions: of the subject's tokens, ascending.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    answer: int

    def __post_init__(self) -> None:
        if not self.positions:
            raise PromptError("the subject has no token in the prompt; give its text as it stands")


@dataclass(frozen=True)
class TraceCell:
    """One restoration: `site` kinds of `layers` at one token."""

    restore: Restore
    layer: int
    layers: tuple[int, ...]
    position: int


@dataclass(frozen=True, eq=False)
class Trace:
    """What a trace of one prompt found.

    Attributes:
        clean: metric of the clean run. noisy: of the noisy rows, [seed].
        restored: of every cell in every noisy row, [cell, seed].
        noise: standard deviation of the noise.
    """

    cells: tuple[TraceCell, ...]
    clean: float
    noisy: Float[Tensor, " seed"]
    restored: Float[Tensor, "cell seed"]
    noise: float

    @property
    def indirect(self) -> Float[Tensor, " cell"]:
        """Mean over seeds of what a restoration adds to the noisy run."""
        return (self.restored - self.noisy).mean(dim=1)


def trace_cells(
    model: LanguageModel,
    n_columns: int,
    restore: Restore,
    *,
    window: int = WINDOW,
    positions: Sequence[int] | None = None,
) -> list[TraceCell]:
    """Return the grid of one kind: every position by every layer.

    A window of w around layer l covers layers l - w // 2 up to, not including, l - w // 2 + w, cut
    at both ends of the model; single states have no window.
    """
    if restore not in RESTORED:
        raise ConfigError(f"restore={restore!r}; use {', '.join(RESTORED)}")
    if window < 1:
        raise ConfigError(f"window is {window}; use 1 or more layers")
    cells: list[TraceCell] = []
    for position in range(n_columns) if positions is None else positions:
        for layer in range(model.n_layers):
            layers: tuple[int, ...] = (layer,)
            if restore != "state":
                first = layer - window // 2
                layers = tuple(range(max(first, 0), min(first + window, model.n_layers)))
            cells.append(TraceCell(restore, layer, layers, position))
    return cells


def embedding_noise(
    model: LanguageModel, subjects: Sequence[Sequence[int]], *, factor: float = NOISE_FACTOR
) -> float:
    """Return `factor` times the standard deviation of the embeddings of subjects' tokens.

    Args:
        subjects: ids of the tokens of every subject of a data set (of one prompt at the least).
    """
    ids = [id_ for subject in subjects for id_ in subject]
    if not ids:
        raise PromptError("there is no subject token to take the noise from; give at least one")
    # One token a row: subjects may be more tokens together than a context holds.
    values = model.run(batch_of([[id_] for id_ in ids]), capture="embed", stop_after=0)["embed"]
    return factor * float(values.double().std(unbiased=False))


def trace(
    model: LanguageModel,
    subject: Subject,
    cells: Sequence[TraceCell],
    *,
    noise: float,
    seeds: int = SEEDS,
    seed: int = 0,
    metric: str | Metric = "prob",
    products: Products = "default",
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Restore clean states in noisy runs of one prompt, cell by cell.

    Every noisy row has noise of its own, the same for all cells: drawn on the CPU from `seed`.

    Args:
        noise: standard deviation, in units of the embedding (see `embedding_noise`).
        seeds: noisy rows.
    """
    clean, noisy = record_noisy(
        model, subject, cells, noise=noise, seeds=seeds, seed=seed, products=products
    )
    targets = Targets((subject.answer,))
    chosen = metric_of(metric)
    reader = Reader(model, (chosen,), (targets,) * seeds, clean.final.expand(seeds, -1), products)
    below = reader(noisy.final, range(seeds))[:, 0]
    top = float(reader(clean.final, [0])[0, 0])
    live = [at for at, cell in enumerate(cells) if cell.position >= subject.positions[0]]
    restored = below.expand(len(cells), -1).clone()
    if live:
        many = [restoring(clean, cells[at], row) for at in live for row in range(seeds)]
        done = _per_cell(progress, seeds)
        values = run_cells(noisy, many, reader, budget=budget, progress=done)
        restored[live] = values[:, 0].view(len(live), seeds)
    if progress is not None:
        progress(len(cells) - len(live))
    return Trace(tuple(cells), top, below, restored, noise)


def record_noisy(
    model: LanguageModel,
    subject: Subject,
    cells: Sequence[TraceCell],
    *,
    noise: float,
    seeds: int = SEEDS,
    seed: int = 0,
    products: Products = "default",
) -> tuple[Recording, Recording]:
    """Return the clean run and the noisy ones, one row per seed."""
    if seeds < 1 or noise < 0:
        raise ConfigError("causal tracing needs at least one seed, and noise that is not negative")
    sites = list(
        dict.fromkeys(
            str(site_of(model, Site(RESTORED[cell.restore], layer)))
            for cell in cells
            for layer in cell.layers
        )
    )
    clean = record(model, batch_of([subject.ids]), capture=sites, products=products)
    generator = torch.Generator().manual_seed(seed)
    shape = (seeds, len(subject.positions), model.d_model)
    drawn = noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    add = Add("embed", drawn.to(model.dtype), positions=list(subject.positions))
    noisy = record(model, batch_of([subject.ids] * seeds), edits=[add], products=products)
    return clean, noisy


def restoring(clean: Recording, cell: TraceCell, row: int) -> Cell:
    """Return the cell that puts clean values into one noisy row."""
    at = cell.position
    kind = RESTORED[cell.restore]
    return Cell(
        tuple(
            Patch(Site(kind, layer), (at,), clean.value(Site(kind, layer))[0, at : at + 1])
            for layer in cell.layers
        ),
        row,
    )


def _per_cell(progress: Callable[[int], None] | None, seeds: int) -> Callable[[int], None] | None:
    """Count cells where the engine counts cells times seeds."""
    if progress is None:
        return None
    left = 0

    def count(rows: int) -> None:
        nonlocal left
        left += rows
        whole, left = divmod(left, seeds)
        if whole:
            progress(whole)

    return count
