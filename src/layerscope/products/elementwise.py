"""What stands between the products of a block, in one pass over its numbers.

A gate is two operations of torch, a norm four, a rotary embedding five, each of which reads and
writes everything anew; over the tokens of many rows they take as long as a product. Here every
number is read once. Everything is float32, within a few roundings of the same formula in float64;
minus infinity stays what it is in a gate. Importing this module compiles its loops, or loads them
from numba's cache.
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
X, Y, Z, OUT, N, WIDTH, HEADS, KIND, NEXT, FIELDS = range(10)  # of a task
_GELU, _GELU_GATE, _SILU_GATE, _RMS_NORM, _ROTATE = range(5)


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


@compiled(fastmath={"contract", "reassoc"}, inline=True)
def _mean_square(x: Any, width: int) -> np.float32:
    found = np.float32(0.0)
    for i in range(width):
        found += x[i] * x[i]
    return found / np.float32(width)


@compiled(fastmath=set(), inline=True)
def _rms_norm(task: Longs, first: int, size: int) -> None:
    """Divide rows by the root of their mean square, and multiply with a gain."""
    width = task[WIDTH]
    gain = as_array(pointer(task[Y]), (width,))
    epsilon = as_array(pointer(task[Z]), (1,))[0]
    for row in range(first // width, (first + size) // width):
        x = as_array(pointer(task[X] + 4 * row * width), (width,))
        out = as_array(pointer(task[OUT] + 4 * row * width), (width,))
        scale = _ONE / np.sqrt(_mean_square(x, width) + epsilon)
        for i in range(width):
            out[i] = gain[i] * (x[i] * scale)


@compiled(fastmath=set(), inline=True)
def _rotate(task: Longs, first: int, size: int) -> None:
    """Turn pairs of entries, i and i + width / 2, of every head of every token."""
    width, heads = task[WIDTH], task[HEADS]
    half = width // 2
    for row in range(first // width, (first + size) // width):
        token = 4 * (row // heads) * width
        cos = as_array(pointer(task[Y] + token), (width,))
        sin = as_array(pointer(task[Z] + token), (width,))
        x = as_array(pointer(task[X] + 4 * row * width), (width,))
        out = as_array(pointer(task[OUT] + 4 * row * width), (width,))
        for i in range(half):
            low, high = x[i], x[i + half]
            out[i] = low * cos[i] + -high * sin[i]
            out[i + half] = high * cos[i + half] + low * sin[i + half]


@compiled("void(int64[::1])", fastmath={"contract"})
def apply(task: Longs) -> None:
    """Take some numbers, in whole rows where there are rows, at a time until none is left."""
    n, kind, counter = task[N], task[KIND], task.ctypes.data + 8 * NEXT
    at_once = max(_AT_ONCE // task[WIDTH], 1) * task[WIDTH]
    while True:
        first = take(counter) * at_once
        if first >= n:
            break
        size = min(at_once, n - first)
        if kind == _RMS_NORM:
            _rms_norm(task, first, size)
            continue
        if kind == _ROTATE:
            _rotate(task, first, size)
            continue
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


def rms_norm(
    x: Float[Tensor, "... width"], gain: Float[Tensor, " width"], epsilon: float
) -> Float[Tensor, "... width"]:
    """Return ``gain * x / sqrt(mean(x ** 2) + epsilon)``."""
    constant = torch.tensor([epsilon], dtype=torch.float32)
    return _run(_RMS_NORM, x, gain, constant, width=x.shape[-1])


def rotate(
    x: Float[Tensor, "token head width"],
    cos: Float[Tensor, "token width"],
    sin: Float[Tensor, "token width"],
) -> Float[Tensor, "token head width"]:
    """Return rotary embeddings (J. Su et al., 2021), entry i paired with i + width / 2.

    Bit for bit what torch's ``x * cos + rotate_half(x) * sin`` is.
    """
    return _run(_ROTATE, x, cos, sin, width=x.shape[-1], heads=x.shape[1])


def _run(
    kind: int, x: Tensor, y: Tensor, z: Tensor | None = None, *, width: int = 1, heads: int = 1
) -> Tensor:
    out = torch.empty_like(x)
    task = np.zeros(FIELDS, np.int64)
    task[[X, Y, OUT]] = x.data_ptr(), y.data_ptr(), out.data_ptr()
    task[[N, KIND, WIDTH, HEADS]] = x.numel(), kind, width, heads
    if z is not None:
        task[Z] = z.data_ptr()
    threads = torch.get_num_threads()
    if threads == 1 or x.numel() <= _AT_ONCE:
        apply(task)
    else:
        openmp.run(apply_at, task.ctypes.data, threads=threads)
    return out
