"""Backward passes of what stands between products, for many cotangents at once.

torch pulls cotangents back through a norm, a rotary embedding or a gate one operation of theirs
after the other, each of which reads and writes all of them anew; and through attention one by one.
Here each is one pass. The first axis of a cotangent may be that of `torch.vmap`, all others are
those of the value; what depends on the value alone is computed once for all cotangents. Everything
is float32, within a few roundings. Importing this module compiles its loops, or loads them from
numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.products import elementwise, openmp
from layerscope.products.compiling import Longs, as_array, callback, compiled, take
from layerscope.products.elementwise import pointer

_AT_ONCE = 1 << 14  # numbers that a thread takes at a time
MOST_SCORES = 2**24  # of attention, that are held at a time
# Of a task: where its tensors are, what is done to how many rows of what width, ...
X, Y, Z, GAIN, OUT, KIND, ROWS, WIDTH, NEXT = range(9)
# ... how many values share a pattern or follow each other, and the steps of a tensor's axes.
LENGTH, HEADS, MANY, TOKEN, HEAD, FIELDS = range(9, 15)
_RMS_NORM, _ROTATE, _SOFTMAX = range(3)


@compiled(fastmath={"contract", "reassoc"}, inline=True)
def _dot(x: Any, y: Any, width: int) -> np.float32:
    found = np.float32(0.0)
    for i in range(width):
        found += x[i] * y[i]
    return found


@compiled(fastmath={"contract", "reassoc"}, inline=True)
def _dot3(x: Any, y: Any, z: Any, width: int) -> np.float32:
    found = np.float32(0.0)
    for i in range(width):
        found += x[i] * y[i] * z[i]
    return found


@compiled(fastmath={"contract"}, inline=True)
def _rms_norm(task: Longs, row: int, width: int) -> None:
    """Pull one row back through ``gain * (x * scale)``, where the scale depends on x."""
    at = row % task[LENGTH]
    given = as_array(pointer(task[X] + 4 * row * width), (width,))
    x = as_array(pointer(task[Y] + 4 * at * width), (width,))
    scale = as_array(pointer(task[Z] + 4 * at), (1,))[0]
    gain = as_array(pointer(task[GAIN]), (width,))
    out = as_array(pointer(task[OUT] + 4 * row * width), (width,))
    along = _dot3(given, gain, x, width) * scale * scale * scale / np.float32(width)
    for i in range(width):
        out[i] = given[i] * gain[i] * scale - x[i] * along


@compiled(fastmath={"contract"}, inline=True)
def _rotate(task: Longs, row: int, width: int) -> None:
    """Turn pairs of entries of one head of one token the other way round."""
    heads, length = task[HEADS], task[LENGTH]
    token = row // heads
    at, half = token % length, width // 2
    place = (token // length) * task[MANY] + at * task[TOKEN] + (row % heads) * task[HEAD]
    given = as_array(pointer(task[X] + 4 * place), (width,))
    cos = as_array(pointer(task[Y] + 4 * at * width), (width,))
    sin = as_array(pointer(task[Z] + 4 * at * width), (width,))
    out = as_array(pointer(task[OUT] + 4 * row * width), (width,))
    for i in range(half):
        low, high = given[i], given[i + half]
        out[i] = low * cos[i] + high * sin[i + half]
        out[i + half] = high * cos[i + half] - low * sin[i]


@compiled(fastmath={"contract"}, inline=True)
def _softmax(task: Longs, row: int, width: int) -> None:
    """Pull one row back through a softmax, where it stands."""
    given = as_array(pointer(task[X] + 4 * row * width), (width,))
    pattern = as_array(pointer(task[Y] + 4 * (row // task[LENGTH]) * width), (width,))
    along = _dot(given, pattern, width)
    for i in range(width):
        given[i] = pattern[i] * (given[i] - along)


@compiled("void(int64[::1])", fastmath=set())
def apply(task: Longs) -> None:
    """Take some rows at a time until none is left."""
    rows, width, kind, counter = task[ROWS], task[WIDTH], task[KIND], task.ctypes.data + 8 * NEXT
    at_once = max(_AT_ONCE // width, 1)
    while True:
        first = take(counter) * at_once
        if first >= rows:
            break
        for row in range(first, min(first + at_once, rows)):
            if kind == _RMS_NORM:
                _rms_norm(task, row, width)
            elif kind == _ROTATE:
                _rotate(task, row, width)
            else:
                _softmax(task, row, width)


@callback("void(CPointer(int64))")
def apply_at(address: Longs) -> None:
    """Do what `apply` does, for the task at an address."""
    apply(as_array(address, (FIELDS,)))


def _run(
    kind: int, rows: int, width: int, tensors: dict[int, Tensor], numbers: dict[int, int]
) -> None:
    task = np.zeros(FIELDS, np.int64)
    task[[KIND, ROWS, WIDTH]] = kind, rows, width
    for field, tensor in tensors.items():
        task[field] = tensor.data_ptr()
    for field, number in numbers.items():
        task[field] = number
    threads = torch.get_num_threads()
    if threads == 1 or rows * width <= _AT_ONCE:
        apply(task)
    else:
        openmp.run(apply_at, task.ctypes.data, threads=threads)


def takes(
    query: Float[Tensor, "row head query d"],
    key: Float[Tensor, "row kv_head key d"],
    value: Float[Tensor, "row kv_head key d_value"],
) -> bool:
    """Return whether `attention` has a backward pass for these."""
    alike = all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.ndim == 4
        for tensor in (query, key, value)
    )
    if not (alike and openmp.available() and query.shape[:1] == key.shape[:1]):
        return False
    whole = query.shape[1] % key.shape[1] == 0 and value.shape[:3] == key.shape[:3]
    return whole and query[..., 0].numel() * key.shape[2] <= MOST_SCORES


def rms_norm(
    x: Float[Tensor, "... width"], gain: Float[Tensor, " width"], epsilon: float
) -> Float[Tensor, "... width"]:
    """Return what `elementwise.rms_norm` does, with a gradient of x; the gain gets none."""
    return _RmsNorm.apply(x, gain, epsilon)  # pyright: ignore[reportReturnType]


def rotate(
    x: Float[Tensor, "token head width"],
    cos: Float[Tensor, "token width"],
    sin: Float[Tensor, "token width"],
) -> Float[Tensor, "token head width"]:
    """Return what `elementwise.rotate` does, with a gradient of x."""
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def attention(
    kernel: Callable[[], Float[Tensor, "row head query d_value"]],
    query: Float[Tensor, "row head query d"],
    key: Float[Tensor, "row kv_head key d"],
    value: Float[Tensor, "row kv_head key d_value"],
    *,
    scale: float,
    causal: bool,
) -> Float[Tensor, "row head query d_value"]:
    """Return what a kernel makes of these, with a backward pass of our own.

    It holds patterns of at most `MOST_SCORES` numbers, those of as many cotangents as go in.

    Args:
        kernel: computes ``softmax(scale * query @ key.T) @ value``.
        query, key, value: what it computes that of. Heads share keys and values in turn.
        scale: of the scores. causal: whether a query sees the keys up to its own number alone.
    """
    return _Attention.apply(kernel, query, key, value, scale, causal)  # pyright: ignore[reportReturnType]


class _Pulled(torch.autograd.Function):
    """A backward pass for one cotangent, or for all those of `torch.vmap` in one call."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], cotangent: Tensor, *saved: Any) -> Any:
        """Return what a function makes of cotangents, whose first axis is theirs, and the rest."""
        return tuple(found[0] for found in function(cotangent[None], *saved))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: a gradient of this gradient is refused."""

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: Any, function: Callable[..., Any], cotangent: Tensor, *saved: Any
    ) -> Any:
        if any(axis is not None for axis in in_dims[2:]):
            raise NotImplementedError("only cotangents can be many, not values")
        found = function(cotangent.movedim(in_dims[1], 0), *saved)
        return found, (0,) * len(found)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, gain, torch.rsqrt(x.square().mean(-1) + epsilon))
        return elementwise.rms_norm(x, gain, epsilon)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (found,) = _Pulled.apply(_norm_back, cotangents[0], *ctx.saved_tensors)
        return found, None, None


def _norm_back(
    given: Float[Tensor, "cotangent ..."], x: Tensor, gain: Tensor, scale: Tensor
) -> tuple[Tensor]:
    given, width = given.contiguous(), x.shape[-1]
    out = torch.empty_like(given)
    places = {X: given, Y: x, Z: scale, GAIN: gain, OUT: out}
    _run(_RMS_NORM, given.numel() // width, width, places, {LENGTH: x.numel() // width})
    return (out,)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return elementwise.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (found,) = _Pulled.apply(_rotate_back, cotangents[0], *ctx.saved_tensors)
        return found, None, None


def _rotate_back(
    given: Float[Tensor, "cotangent token head width"], cos: Tensor, sin: Tensor
) -> tuple[Tensor]:
    if given.stride(-1) != 1:
        given = given.contiguous()
    n, length, heads, width = given.shape
    out = given.new_empty(given.shape)
    axes = dict(zip((MANY, TOKEN, HEAD), given.stride(), strict=False))
    places = {X: given, Y: cos, Z: sin, OUT: out}
    _run(_ROTATE, n * length * heads, width, places, {LENGTH: length, HEADS: heads} | axes)
    return (out,)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[[], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.causal = scale, causal
        return kernel()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = *ctx.saved_tensors, ctx.scale, ctx.causal
        query, key, value = _Pulled.apply(_attention_back, cotangents[0], *saved)
        return None, query, key, value, None, None


def _attention_back(
    given: Float[Tensor, "cotangent row head query d_value"],
    query: Float[Tensor, "row head query d"],
    key: Float[Tensor, "row kv_head key d"],
    value: Float[Tensor, "row kv_head key d_value"],
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull cotangents back through a softmax and its two products.

    Heads that share keys ask one after the other, and the cotangents of one query lie side by side:
    so everything is a few products of matrices that all of them share.
    """
    n_rows, n_heads, n_queries, d = query.shape
    n_kv_heads, n_keys, d_value = value.shape[1:]
    keys, values = (part.flatten(0, 1) for part in (key * scale, value))
    queries = query.reshape(n_rows * n_kv_heads, -1, d)
    scores = queries @ keys.mT
    if causal:
        hidden = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
        scores.unflatten(1, (-1, n_queries)).masked_fill_(hidden, -torch.inf)
    pattern, queries = scores.softmax(-1), queries * scale
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in given.split(max(1, MOST_SCORES // scores.numel())):
        n = len(part)
        written = part.permute(1, 2, 3, 0, 4).reshape(*queries.shape[:2], n * d_value)
        of_values = pattern.mT @ written
        slopes = written.unflatten(2, (n, -1)).flatten(1, 2) @ values.mT
        n_slopes = slopes.numel() // n_keys
        _run(_SOFTMAX, n_slopes, n_keys, {X: slopes, Y: pattern}, {LENGTH: n})
        of_queries = slopes @ keys
        of_keys = slopes.view(*queries.shape[:2], n * n_keys).mT @ queries
        found.append(
            (
                of_queries.view(n_rows, n_heads, n_queries, n, d).permute(3, 0, 1, 2, 4),
                of_keys.view(n_rows, n_kv_heads, n, n_keys, d).permute(2, 0, 1, 3, 4),
                of_values.view(n_rows, n_kv_heads, n_keys, n, d_value).permute(3, 0, 1, 2, 4),
            )
        )
    if len(found) == 1:
        return found[0]
    of_queries, of_keys, of_values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return of_queries, of_keys, of_values
