"""What every backend provides, so that nothing above needs to know which one it talks to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from layerscope.models.run import RunPlan

NormChoice: TypeAlias = Literal["final", "next_norm"]


class Capability(Enum):
    """What a backend may be able to do beyond capturing and editing its sites."""

    GRADIENTS = "gradients"
    CACHE = "key-value cache"
    PACKED = "packed rows"


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of a model.

    Attributes:
        family: name of the family table's row, or "structure:<model type>" when resolved without.
        n_embeddings: rows of the token embedding; ids must be below it.
        d_vocab: width of the softmax.
        n_heads: query heads of a block.
        n_kv_heads: key-value heads of a block.
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


class Cache(Protocol):
    """The keys and values of a pass, for later passes to continue; never changed by one.

    Rows may hold padding anywhere: it neither counts as a position nor takes room in a window.
    """

    @property
    def mask(self) -> Bool[Tensor, "batch past"]:
        """True where a stored column belongs to a real token."""
        ...

    def select(self, rows: Sequence[int]) -> Cache:
        """Return the cache of some rows, in this order; a row may be repeated."""
        ...

    def before(self, column: int) -> Cache:
        """Return the cache of the columns before one."""
        ...


@dataclass(frozen=True, eq=False)
class Execution:
    """Raw outcome of a plan: activations by site, the logits asked for, and the cache if kept."""

    activations: Mapping[Site, Tensor]
    logits: Tensor | None
    cache: Cache | None = None


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
        """Return every site that can be captured, in the order of the forward pass.

        Per-head sites are parts of the sites of all heads, and are not listed.
        """
        ...

    def why_not(self, site: Site) -> str | None:
        """Return None when the site can be captured, else one line: why not, and what can be."""
        ...

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when a site that can be captured can be edited too, else one line."""
        ...

    def trailing(self, site: Site, n_keys: int) -> tuple[int, ...]:
        """Return the axes of a site's value without those of batch and token positions.

        (d_model,), (n_heads, d_head), ...; `n_keys` is the number of keys that a query may attend
        to, the last axis of ``scores`` and ``pattern``.
        """
        ...

    def withdraw(self, kinds: Sequence[str], reason: str) -> None:
        """Refuse sites of these kinds from now on, and say why."""
        ...

    def self_checks(self, values: Mapping[Site, Tensor]) -> Iterable[tuple[str, float, str]]:
        """Yield (identity, error, where) for what only the backend can compare, given all sites."""
        ...

    def execute(self, plan: RunPlan) -> Execution:
        """Run one forward pass; every site of the plan has fired, and nothing is left behind."""
        ...

    def why_lacking(self, capability: Capability) -> str:
        """Return one line on why this model has not a capability, and what would have it."""
        ...

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real module that normalises row `row` for a lens."""
        ...

    def expected_embedding(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return what block 0 should read for these ids, from the weights alone."""
        ...
