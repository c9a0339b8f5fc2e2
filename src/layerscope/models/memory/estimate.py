"""From a model's sizes to bytes: weights, cache, activations, readout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from layerscope.errors import ConfigError
from layerscope.models.devices import dtype_name
from layerscope.models.memory.sizes import Sizes

GIB = 2**30
# Alignment and fragments of the allocator, buffers, norms kept in float32.
SLACK = 0.05
# The default budget of the readout's tiles (readout.stream).
READOUT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Format:
    """How weights are held in memory.

    Attributes:
        name: e.g. ``bfloat16`` or ``4 bit``.
        dtype: of everything that is not packed, and of the activations.
        packed: bytes per packed parameter, scales included; None packs nothing.
    """

    name: str
    dtype: torch.dtype
    packed: float | None = None

    def weights(self, sizes: Sizes) -> int:
        """Return the bytes of the weights."""
        if sizes.packed_bytes is not None and self.packed is not None:
            return sizes.packed_bytes
        whole = sizes.parameters * self.dtype.itemsize
        if self.packed is None:
            return whole
        linear = sizes.linear
        if linear is None:  # only a name: the embedding of a usual model is a tenth of it
            linear = round(0.9 * sizes.parameters)
        return round(whole - linear * (self.dtype.itemsize - self.packed))


EIGHT_BIT = Format("8 bit", torch.bfloat16, 1.0)
# NF4 with one float32 scale per block of 64 (QLoRA, section 3, without double quantisation).
FOUR_BIT = Format("4 bit", torch.bfloat16, 0.5 + 4 / 64)
FORMATS = (
    Format("float32", torch.float32),
    Format("bfloat16", torch.bfloat16),
    EIGHT_BIT,
    FOUR_BIT,
)


def format_of(dtype: torch.dtype, sizes: Sizes | None = None, kind: str = "") -> Format:
    """Return the format of a dtype; of a model that is quantised in its files, as it stands.

    Args:
        dtype: of the weights, or of those that are not packed.
        sizes: the model.
        kind: of the device (``cuda``), since some schemes are unpacked on some.
    """
    if sizes is None or sizes.packed_bytes is None:
        return Format(dtype_name(dtype), dtype)
    if kind in sizes.unpacked_on:
        return Format(f"{dtype_name(dtype)} (unpacked)", dtype)
    return Format(f"{dtype_name(dtype)} ({sizes.scheme} as stored)", dtype, packed=0.0)


@dataclass(frozen=True)
class Workload:
    """What will be run: `batch` prompts of `positions` tokens, every residual kept.

    Attributes:
        cache: keys and values are kept (generation); a plain run keeps none.
    """

    batch: int = 1
    positions: int = 512
    cache: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")


@dataclass(frozen=True)
class Estimate:
    """Bytes that a model needs on its device; None where its name alone does not say.

    Attributes:
        weights: in the format.
        cache: keys and values of all layers.
        activations: residuals of every layer as captured, the working set of one block, and the
            logits of one position per prompt.
        readout: tiles of the readout (its default budget).
        slack: 5% of the weights for what allocators lose.
    """

    format: Format
    weights: int
    cache: int | None
    activations: int | None
    readout: int
    slack: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights + (self.cache or 0) + (self.activations or 0) + self.readout + self.slack
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in bytes, ready for JSON."""
        return {
            "format": self.format.name,
            "weights": self.weights,
            "kv_cache": self.cache,
            "activations": self.activations,
            "readout": self.readout,
            "slack": self.slack,
            "total": self.total,
        }


def estimate(sizes: Sizes, form: Format, workload: Workload) -> Estimate:
    """Return what a model needs in a format for a workload."""
    weights = form.weights(sizes)
    return Estimate(
        format=form,
        weights=weights,
        cache=_cache(sizes, form, workload) if workload.cache else 0,
        activations=_activations(sizes, form, workload),
        readout=READOUT_BYTES,
        slack=round(SLACK * weights),
    )


def show_bytes(count: float) -> str:
    """Return a number of bytes as people read it, e.g. ``"1.5 GiB"``."""
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if abs(value) >= 99.95 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def _cache(sizes: Sizes, form: Format, workload: Workload) -> int | None:
    if sizes.n_layers is None:
        return None
    values = sum(
        layer.values * min(workload.positions, layer.window or workload.positions)
        for layer in sizes.kv
    )
    return values * workload.batch * form.dtype.itemsize


def _activations(sizes: Sizes, form: Format, workload: Workload) -> int | None:
    if sizes.n_layers is None or sizes.d_model is None or sizes.d_vocab is None:
        return None
    size, tokens = form.dtype.itemsize, workload.batch * workload.positions
    kept = (sizes.n_layers + 1) * sizes.d_model
    # At the worst moment of a block: stream and norm in float32; queries, keys and values, rotated
    # and not, and attention's output; gate, activation, up and product.
    block = 2 * 4 * sizes.d_model + size * (10 * sizes.d_model + 4 * (sizes.d_mlp or 0))
    scores = 0
    if sizes.eager:
        scores = (sizes.n_heads or 0) * workload.batch * workload.positions**2 * (4 + size)
    logits = workload.batch * sizes.d_vocab * (4 + size)
    return tokens * (kept * size + block) + scores + logits
