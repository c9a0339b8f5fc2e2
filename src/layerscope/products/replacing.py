"""Within a scope, torch's large float32 products on the CPU run on its matrix units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerscope.products import matrix_units

_ATEN = torch.ops.aten
# Below so many rows and columns the parts of a factor, once made, are too little used.
_LEAST, _LEAST_TURNED = 96, 192  # the second where the larger factor is turned
_LEAST_DEPTH = 64


class MatrixUnits(TorchDispatchMode):
    """Sends products of this thread to `matrix_units`, those of backward passes too."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation of torch."""
        replaced = _REPLACED.get(func)
        if replaced is not None:
            found = replaced(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _suits(a: Tensor, b: Tensor, **others: Any) -> bool:
    if others:  # a factor on the product, say
        return False
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device.type != "cpu":
        return False
    if type(a) not in _PLAIN or type(b) not in _PLAIN or a.layout != torch.strided:
        return False
    (n_rows, depth), n_columns = a.shape, b.shape[1]
    large = a if n_rows > n_columns else b.T
    least = _LEAST if large.stride(1) == 1 else _LEAST_TURNED
    return min(n_rows, n_columns) >= least and depth >= _LEAST_DEPTH


_PLAIN = (Tensor, torch.nn.Parameter)


def _mm(a: Tensor, b: Tensor, **others: Any) -> Tensor | None:
    return matrix_units.product(a, b) if _suits(a, b, **others) else None


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor, **others: Any) -> Tensor | None:
    fits = out.shape == (len(a), b.shape[1]) and out.dtype == a.dtype and 1 in out.stride()
    return matrix_units.product(a, b, out=out) if fits and _suits(a, b, **others) else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **others: Any) -> Tensor | None:
    return matrix_units.product(a, b).add_(bias) if _suits(a, b, **others) else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    rows = x.reshape(-1, x.shape[-1])
    found = _mm(rows, weight.T)
    if found is None:
        return None
    return (found if bias is None else found.add_(bias)).view(*x.shape[:-1], -1)


_REPLACED: dict[Any, Callable[..., Tensor | None]] = {
    _ATEN.mm.default: _mm,
    _ATEN.mm.out: _mm_out,
    _ATEN.addmm.default: _addmm,
    _ATEN.linear.default: _linear,
}
