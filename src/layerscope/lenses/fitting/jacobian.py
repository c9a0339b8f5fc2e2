"""The Jacobian lens's fit: derivatives of the last residual by earlier ones, averaged over text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import CapabilityError, ConfigError, LensError
from layerscope.lenses.fitting.corpus import Corpus, DataConfig
from layerscope.lenses.fitting.states import row_sites
from layerscope.models.backends.base import Capability
from layerscope.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class JacobianOptions:
    """How the Jacobians are averaged.

    Attributes:
        sequences: packed sequences to average over.
        skip: first positions of a sequence left out, as sources and as targets (attention sinks).
        batch: sequences that are differentiated at once.
    """

    sequences: int = 64
    skip: int = 16
    batch: int = 8

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("skip", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least {least}")


class JacobianSteps:
    """Averages Jacobians batch by batch, with the estimator of Gurnee et al. (2026).

    For every source position the derivatives of all target positions from it on are summed; source
    positions and sequences are averaged. One pull-back per coordinate of the last residual: a
    one-hot cotangent at all target positions at once. The last position is left out, as there is no
    next token to predict.
    """

    def __init__(
        self, model: LanguageModel, corpus: Corpus, data: DataConfig, options: JacobianOptions
    ) -> None:
        if Capability.GRADIENTS not in model.backend.capabilities:
            raise CapabilityError(
                f"the {model.backend.name} backend computes no gradients, which the Jacobian lens "
                "needs; use 'huggingface'"
            )
        if data.length(model) <= options.skip + 1:
            raise ConfigError(
                f"sequences of {data.length(model)} tokens leave nothing after skip {options.skip}"
            )
        self._model, self._options = model, options
        self._ids = corpus.train[: options.sequences]
        shape = (model.n_layers, model.d_model, model.d_model)
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._count = 0

    @property
    def n_steps(self) -> int:
        """Number of batches."""
        return -(-len(self._ids) // self._options.batch)

    @property
    def note(self) -> str:
        """How many source positions there are."""
        return f"{self._count:,} positions"

    def step(self, index: int) -> bool:
        """Add one batch; raises LensError where its derivatives are not finite."""
        size = self._options.batch
        ids = self._ids[index * size : (index + 1) * size].long()
        sites = row_sites(self._model.n_layers)
        result = self._model.run(ids, capture=sites, logits=None, gradients=True)
        *sources, target = (result[site] for site in sites)
        valid = slice(self._options.skip, ids.shape[1] - 1)
        last = target.shape[-1] - 1
        for coordinate in range(target.shape[-1]):
            cotangent = torch.zeros_like(target)
            cotangent[:, valid, coordinate] = 1.0
            found = torch.autograd.grad(
                target, sources, cotangent, retain_graph=coordinate < last, allow_unused=False
            )
            for layer, gradient in enumerate(found):
                total = gradient[:, valid].double().sum((0, 1)).cpu()
                self._sum[layer, coordinate] += total
        self._count += len(ids) * (ids.shape[1] - 1 - self._options.skip)
        if not bool(torch.isfinite(self._sum).all()):
            raise LensError(f"derivatives of batch {index} are not finite; run it in float32")
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the sums."""
        return {"sum": self._sum}, {"count": self._count}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from stored sums."""
        self._sum, self._count = tensors["sum"], int(values["count"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the lens."""
        return {"jacobian": (self._sum / self._count).float()}
