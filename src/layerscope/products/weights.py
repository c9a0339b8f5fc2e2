"""Weights whose parts are kept while products with them follow each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


class _HasParts(Protocol):
    @property
    def parts(self) -> Tensor: ...


Parts = TypeVar("Parts", bound=_HasParts)

_MOST_BYTES = 64 * 2**20
_here = threading.local()


class _Kept:
    """What was made of weights, up to so many bytes."""

    def __init__(self) -> None:
        self.made: dict[tuple[object, ...], tuple[Tensor, Any]] = {}
        self.bytes = 0


@contextmanager
def weights_kept() -> Generator[None]:
    """Keep what products of this thread make of weights until the end: 64 MiB of it at most.

    Worth it around passes that go through the same few layers again and again. A weight that is
    changed meanwhile is noticed, but not where that is done behind autograd's back (`.data`).
    """
    before: _Kept | None = getattr(_here, "kept", None)
    _here.kept = before or _Kept()
    try:
        yield
    finally:
        _here.kept = before


def keeps() -> bool:
    """Return True inside of a scope."""
    return getattr(_here, "kept", None) is not None


def kept(factor: Tensor, which: object, make: Callable[[], Parts]) -> Parts:
    """Return what `make` makes of a part of a factor; in a scope, of a weight it is made once.

    Args:
        factor: a view of a weight, or anything else.
        which: number of the part, or whatever else tells it from others.
        make: makes something that has `parts`, a tensor.
    """
    store: _Kept | None = getattr(_here, "kept", None)
    weight = factor if factor._base is None else factor._base  # pyright: ignore[reportPrivateUsage]
    if store is None or not isinstance(weight, torch.nn.Parameter) or weight.is_inference():
        return make()
    version = weight._version  # pyright: ignore[reportPrivateUsage]
    key = (id(weight), version, factor.data_ptr(), factor.shape, factor.stride(), which)
    if key in store.made:
        return store.made[key][1]
    made = make()
    if store.bytes + made.parts.numel() <= _MOST_BYTES:
        # With the weight itself, so that no other comes to lie where it is.
        store.made[key] = weight, made
        store.bytes += made.parts.numel()
    return made
