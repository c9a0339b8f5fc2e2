"""What every backend provides, so that nothing above needs to know which one it talks to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from layerscope.models.run import RunPlan
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

NormChoice: TypeAlias = Literal["final", "next_norm"]


class Capability(Enum):
    """What a backend may be able to do beyond capturing and editing residuals."""

    GRADIENTS = "gradients"
    HEAD_SITES = "head sites"
    PATTERNS = "attention patterns"
    CACHE = "key-value cache"
    GENERATION = "generation"


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of a model.

    Attributes:
        family: name of the family table's row, or "structure:<model type>" when resolved without.
        n_embeddings: rows of the token embedding; ids must be below it.
        d_vocab: width of the softmax.
        n_ctx: longest prompt in tokens, or None when nothing limits it.
        architecture: "post_norm" where blocks read the residual stream without a norm.
    """

    family: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_embeddings: int
    n_heads: int
    n_kv_heads: int
    n_ctx: int | None
    architecture: Literal["pre_norm", "post_norm"] = "pre_norm"


@dataclass(frozen=True, eq=False)
class Execution:
    """Raw outcome of a plan: activations by site, and the logits asked for."""

    activations: Mapping[Site, Tensor]
    logits: Tensor | None


class Backend(Protocol):
    """One way of running models: Hugging Face, TransformerLens, MLX."""

    @property
    def name(self) -> str:
        """Name of the backend, as `load` takes it."""
        ...

    @property
    def info(self) -> ModelInfo:
        """Sizes of the model."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What else it can do."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the residual stream begins."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        ...

    @property
    def unembedding(self) -> Unembedding:
        """The real output head, not a copy."""
        ...

    def sites(self) -> Sequence[Site]:
        """Return every site that can be captured and edited, in the order of the forward pass."""
        ...

    def why_not(self, site: Site) -> str | None:
        """Return None when the site is available, else one line saying why not and what is."""
        ...

    def execute(self, plan: RunPlan) -> Execution:
        """Run one forward pass; every site of the plan has fired, and nothing is left behind."""
        ...

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real module that normalises row `row` for a lens."""
        ...

    def expected_embedding(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return what block 0 should read for these ids, from the weights alone."""
        ...
