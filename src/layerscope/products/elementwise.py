"""What stands between the products of an MLP, in one pass over its numbers.

A gate is two operations of torch, each of which reads and writes everything anew; over the tokens
of many rows they take as long as a product. Here every number is read once. Everything is float32,
within a few roundings of the same formula in float64; minus infinity stays what it is. Importing
this module compiles its loops, or loads them from numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from layerscope.products import openmp
from layerscope.products.compiling import Longs, as_array, callback, compiled, ir, take
from layerscope.products.powers import exp2

_ONE, _HIGHEST = np.float32(1.0), np.float32(126.0)  # the last power that `exp2` knows
_LOG2_E = np.float32(1.4426950408889634)
_CUBE = np.float32(0.044715)  # D. Hendrycks and K. Gimpel, 2016: GELU by a hyperbolic tangent
_TWICE = np.float32(2.0 * (2.0 / np.pi) ** 0.5)

_AT_ONCE = 1 << 14  # numbers that a thread takes at a time
X, Y, OUT, N, KIND, NEXT, FIELDS = range(7)  # of a task
_GELU, _GELU_GATE, _SILU_GATE = range(3)


@intrinsic
def _pointer(_typing: Any, address: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Return an address as one of floats."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


pointer = cast("Callable[[int], Any]", _pointer)


@compiled(fastmath={"contract"}, inline=True)
def _sigmoid(x: np.float32) -> np.float32:
    """Return 1 / (1 + 2 ** -x); NaN for NaN."""
    return _ONE / (_ONE + exp2(_HIGHEST if -x > _HIGHEST else -x))


@compiled(fastmath={"contract"}, inline=True)
def _silu(x: np.float32) -> np.float32:
    return x * _sigmoid(x * _LOG2_E)


@compiled(fastmath={"contract"}, inline=True)
def _gelu(x: np.float32) -> np.float32:
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    return x * _sigmoid(_TWICE * _LOG2_E * (x + _CUBE * x * x * x))


@compiled("void(int64[::1])", fastmath={"contract"})
def apply(task: Longs) -> None:
    """Take some numbers at a time until none is left."""
    n, kind, counter = task[N], task[KIND], task.ctypes.data + 8 * NEXT
    while True:
        first = take(counter) * _AT_ONCE
        if first >= n:
            break
        size = min(_AT_ONCE, n - first)
        x = as_array(pointer(task[X] + 4 * first), (size,))
        y = as_array(pointer(task[Y] + 4 * first), (size,))
        out = as_array(pointer(task[OUT] + 4 * first), (size,))
        if kind == _GELU:
            for i in range(size):
                out[i] = _gelu(x[i])
        elif kind == _GELU_GATE:
            for i in range(size):
                out[i] = _gelu(x[i]) * y[i]
        else:
            for i in range(size):
                out[i] = _silu(x[i]) * y[i]


@callback("void(CPointer(int64))")
def apply_at(address: Longs) -> None:
    """Do what `apply` does, for the task at an address."""
    apply(as_array(address, (FIELDS,)))


def suits(*tensors: Tensor) -> bool:
    """Return True where tensors lie in the CPU's memory as these loops want them."""
    return openmp.available() and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )


def gelu(x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """Return the tanh form of GELU."""
    return _run(_GELU, x, x)


def gelu_gate(
    gate: Float[Tensor, "... width"], up: Float[Tensor, "... width"]
) -> Float[Tensor, "... width"]:
    """Return ``gelu(gate) * up``, of the tanh form."""
    return _run(_GELU_GATE, gate, up)


def silu_gate(
    gate: Float[Tensor, "... width"], up: Float[Tensor, "... width"]
) -> Float[Tensor, "... width"]:
    """Return ``silu(gate) * up``."""
    return _run(_SILU_GATE, gate, up)


def _run(kind: int, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    task = np.zeros(FIELDS, np.int64)
    task[[X, Y, OUT]] = x.data_ptr(), y.data_ptr(), out.data_ptr()
    task[[N, KIND]] = x.numel(), kind
    threads = torch.get_num_threads()
    if threads == 1 or x.numel() <= _AT_ONCE:
        apply(task)
    else:
        openmp.run(apply_at, task.ctypes.data, threads=threads)
    return out
