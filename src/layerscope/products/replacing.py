"""Within a scope, torch's large float32 products on the CPU run on its matrix units."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from layerscope.products import matrix_units

# Below so many rows and columns the parts of a factor, once made, are too little used; and below
# so many products of numbers the calls themselves take too long.
_LEAST, _LEAST_TURNED = 64, 96  # the second where the larger factor is turned
_LEAST_DEPTH, _LEAST_WORK = 128, 2**26

_lock = threading.Lock()
_open: list[torch.library.Library] = []  # one entry for each open scope, all the same


@contextmanager
def matrix_unit_products() -> Generator[None]:
    """Send the products of the whole process to `matrix_units`, those of backward passes too.

    torch's own kernels are set aside for as long as any scope is open; what does not suit goes to
    the same kernels by their other door, where the caller brings the memory for the result.
    """
    with _lock:
        if not _open:
            library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that kernels are set aside
                library.impl("mm", _mm, "CPU")
                library.impl("addmm", _addmm, "CPU")
        else:
            library = _open[-1]
        _open.append(library)
    try:
        yield
    finally:
        with _lock:
            _open.pop()
            if not _open:
                library._destroy()  # pyright: ignore[reportPrivateUsage]


def _suits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.ndim != 2 or b.ndim != 2:
        return False
    (n_rows, depth), n_columns = a.shape, b.shape[1]
    large = a if n_rows > n_columns else b.T
    least = _LEAST if large.stride(1) == 1 else _LEAST_TURNED
    enough = min(n_rows, n_columns) >= least and depth >= _LEAST_DEPTH
    return enough and n_rows * n_columns * depth >= _LEAST_WORK and depth == len(b)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _suits(a, b):
        return matrix_units.product(a, b)
    return torch.mm(a, b, out=a.new_empty(0))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and bias.dtype == torch.float32 and _suits(a, b):
        if bias.shape == b.shape[1:] and bias.is_contiguous():
            return matrix_units.product(a, b, bias)
        return matrix_units.product(a, b).add_(bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(0))
