"""The prism's fit: an orthogonal map between whitened states, from paired moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, LensError
from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.corpus import Corpus, DataConfig, batch_at, n_batches
from layerscope.lenses.fitting.states import states_at
from layerscope.models.language_model import LanguageModel

Whitening = Literal["diagonal", "full"]
_FLOOR = 1e-6  # of the mean variance: directions below are noise, and are not blown up


@dataclass(frozen=True, kw_only=True)
class PrismOptions:
    """How the prism is fitted.

    Attributes:
        whitening: "full" decorrelates coordinates, "diagonal" only scales them.
        rank: how many of the best correlated directions are kept; None for all; "auto" tries all,
            half, a quarter, ... of them, and takes what is best on the validation text.
    """

    whitening: Whitening = "full"
    rank: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.whitening not in ("diagonal", "full"):
            raise ConfigError(f"whitening is '{self.whitening}'; use 'diagonal' or 'full'")
        if self.rank not in (None, "auto") and (isinstance(self.rank, str) or self.rank < 1):
            raise ConfigError(f"rank is {self.rank}; give at least 1, 'auto', or None for all")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over pairs of rows x (what a lens reads) and y (what the head sees), in float64."""

    count: int
    x: Float[Tensor, " d_model"]
    y: Float[Tensor, " d_model"]
    xx: Float[Tensor, "d_model d_model"]
    yy: Float[Tensor, "d_model d_model"]
    xy: Float[Tensor, "d_model d_model"]

    @staticmethod
    def zero(d_model: int) -> Moments:
        """Return the moments of no rows."""
        vector = torch.zeros(d_model, dtype=torch.float64)
        matrix = torch.zeros(d_model, d_model, dtype=torch.float64)
        return Moments(0, vector, vector, matrix, matrix, matrix)

    def plus(self, x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"]) -> Moments:
        """Return the moments with more pairs."""
        x, y = x.double().cpu(), y.double().cpu()
        return Moments(
            self.count + len(x),
            self.x + x.sum(0),
            self.y + y.sum(0),
            self.xx + x.T @ x,
            self.yy + y.T @ y,
            self.xy + x.T @ y,
        )


def solve_prism(moments: Moments, options: PrismOptions) -> dict[str, Tensor]:
    """Return the tensors of the prism that the moments determine.

    With X and Y whitened, the orthogonal Q that minimises ||X Q - Y|| is U V' of the singular value
    decomposition U S V' of X' Y (Schönemann, 1966); the least-squares gain on top of it is the mean
    of the singular values kept, which are the canonical correlations under full whitening. A rank
    keeps the best of them and leaves the mean state for the rest.

    Args:
        moments: of the pairs.
        options: a rank of "auto" is not settled here and keeps all directions.

    Raises:
        LensError: too few rows for the width.
        ConfigError: the rank is beyond the width.
    """
    d_model = moments.x.shape[0]
    if moments.count <= 2 * d_model:
        raise LensError(
            f"{moments.count} rows are too few to whiten {d_model} coordinates; fit on more tokens"
        )
    rank = options.rank if isinstance(options.rank, int) else d_model
    if rank > d_model:
        raise ConfigError(f"rank {rank} is beyond the width of the model, {d_model}")
    n = moments.count
    mean_x, mean_y = moments.x / n, moments.y / n
    cov_x = moments.xx / n - torch.outer(mean_x, mean_x)
    cov_y = moments.yy / n - torch.outer(mean_y, mean_y)
    cov_xy = moments.xy / n - torch.outer(mean_x, mean_y)
    whiten, _ = _roots(cov_x, options.whitening)
    whiten_y, colour = _roots(cov_y, options.whitening)
    cross = _both_sides(whiten, cov_xy, whiten_y)
    u, s, vt = torch.linalg.svd(cross)
    rotation = u[:, :rank] @ vt[:rank]
    power = _both_sides(whiten, cov_x, whiten)
    # ||X Q||^2 = tr(Q' Cov Q): the rank under full whitening, near it under diagonal.
    gain = s[:rank].sum() / torch.trace(rotation.T @ power @ rotation)
    tensors = {
        "mean_in": mean_x,
        "mean_out": mean_y,
        "whiten": whiten,
        "colour": colour,
        "rotation": rotation,
        "gain": gain.reshape(1),
    }
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _roots(covariance: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """Return the inverse square root and the square root of a covariance (or its diagonal)."""
    if whitening == "diagonal":
        variance = covariance.diagonal()
        variance = variance.clamp_min(_FLOOR * float(variance.mean()))
        return variance.rsqrt(), variance.sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(_FLOOR * float(values.mean()))
    return (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T


def _both_sides(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    middle = left[:, None] * middle if left.ndim == 1 else left @ middle
    return middle * right if right.ndim == 1 else middle @ right


class PrismSteps:
    """Gathers moments batch by batch: rows of all depths below the last against the head's."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        data: DataConfig,
        options: PrismOptions,
        norm: NormChoice,
    ) -> None:
        if isinstance(options.rank, int) and options.rank > model.d_model:
            raise ConfigError(
                f"rank {options.rank} is beyond the width of the model, {model.d_model}"
            )
        self._model, self._corpus, self._data = model, corpus, data
        self._norm: NormChoice = norm
        self.moments = Moments.zero(model.d_model)

    @property
    def n_steps(self) -> int:
        """Number of batches."""
        return n_batches(self._corpus.train, self._data)

    @property
    def note(self) -> str:
        """How many pairs there are."""
        return f"{self.moments.count:,} pairs"

    @torch.no_grad()
    def step(self, index: int) -> bool:
        """Add one batch; raises LensError where its states are not finite."""
        ids, positions = batch_at(self._corpus.train, self._data, index)
        states = states_at(self._model, ids, positions)
        for row in range(self._model.n_layers):
            x = self._model.norm_at(row, self._norm)[1](states.residual[row]).float()
            self.moments = self.moments.plus(x, states.head)
        if not bool(torch.isfinite(self.moments.xy).all()):
            raise LensError(f"states of batch {index} are not finite; run the model in float32")
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the moments."""
        found = self.moments
        names = ("x", "y", "xx", "yy", "xy")
        return {name: getattr(found, name) for name in names}, {"count": found.count}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from stored moments."""
        self.moments = Moments(int(values["count"]), **tensors)

    def tensors(self, options: PrismOptions) -> dict[str, Tensor]:
        """Return the tensors of the lens; raises LensError for too few rows."""
        return solve_prism(self.moments, options)
