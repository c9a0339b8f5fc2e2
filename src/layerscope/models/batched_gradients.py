"""Gradients of many cotangents in one backward pass.

torch's `vmap` pulls a batch of cotangents through most functions in one call, but through some
activation functions and attention kernels one by one. Activation functions act on each number by
itself, so their slopes can be had in advance, and a batch of cotangents is then multiplied with
them; attention is left to `products.derivatives` where that can take it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

KEPT = 32  # numbers of d_model width that a block's backward pass keeps of a token
# Those that models use, of those without a rule for batches.
_ONE_BY_ONE: tuple[Callable[..., Tensor], ...] = (
    functional.silu,
    functional.gelu,
    functional.mish,
    functional.elu,
    functional.leaky_relu,
    functional.relu6,
    functional.softplus,
    torch.tanh,
)


class BatchedGradients(TorchFunctionMode):
    """While it is on, such functions are ready for backward passes of many cotangents.

    Values stay what they were, bit for bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if torch.is_grad_enabled():
            in_place = options.get("inplace", False) or "out" in options
            if func in _ONE_BY_ONE and args and not in_place:

                def function(values: Tensor) -> Tensor:
                    return func(values, *args[1:], **options)

                return _Slopes.apply(args[0], function)
            if func is functional.scaled_dot_product_attention:
                return _attention(*args, **options)
        return func(*args, **options)


def pull_back(
    above: Tensor, below: Sequence[Tensor], cotangents: Float[Tensor, "cotangent ..."]
) -> tuple[Float[Tensor, "cotangent ..."], ...]:
    """Return the gradients of tensors below for every cotangent of `above`; the graph is kept."""

    def one(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(above, below, cotangent, retain_graph=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*performance drop.*", UserWarning)
        return torch.vmap(one)(cotangents)


def gate(activation: Callable[[Tensor], Tensor], gates: Tensor, values: Tensor) -> Tensor:
    """Return ``activation(gates) * values``."""
    return _Gate.apply(gates, values, activation)  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=1)
def derivatives() -> ModuleType | None:
    """Return backward passes of our own; None without numba, or one that goes with this numpy."""
    try:
        from layerscope.products import derivatives as found
    except (ImportError, OSError):
        return None
    return found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    def kernel() -> Tensor:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    mine = derivatives()
    plain = attn_mask is None and dropout_p == 0.0
    if mine is None or not plain or not mine.takes(query, key, value):
        return kernel()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return mine.attention(kernel, query, key, value, scale=factor, causal=is_causal)


def _with_slopes(function: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = values.detach().requires_grad_(True)
        found = function(leaf)
        (slopes,) = torch.autograd.grad(found, leaf, torch.ones_like(found))
    return found.detach(), slopes


class _Slopes(torch.autograd.Function):
    """An activation function and, as its backward pass, a product with its slopes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        found, slopes = _with_slopes(function, values)
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return cotangents[0] * slopes, None


class _Gate(torch.autograd.Function):
    """A gate whose backward pass is one product with each of two slopes."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, values: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        found, slopes = _with_slopes(activation, gates)
        ctx.save_for_backward(slopes * values, found)
        return found * values

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        of_gates, of_values = ctx.saved_tensors
        return cotangents[0] * of_gates, cotangents[0] * of_values, None
