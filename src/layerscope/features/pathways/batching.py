"""Activation functions whose backward passes serve many cotangents at once.

torch pulls a batch of cotangents through most functions in one call, but through some activation
functions one by one. They act on each number by itself, so their slopes can be had in advance, and
a batch of cotangents is then multiplied with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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


class BatchedActivations(TorchFunctionMode):
    """While it is on, such activation functions keep their slopes for the backward pass.

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
        in_place = options.get("inplace", False) or "out" in options
        if func in _ONE_BY_ONE and not in_place and torch.is_grad_enabled():

            def function(values: Tensor) -> Tensor:
                return func(values, *args[1:], **options)

            return _Slopes.apply(args[0], function)
        return func(*args, **options)


class _Slopes(torch.autograd.Function):
    """An activation function and, as its backward pass, a product with its slopes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = values.detach().requires_grad_(True)
            found = function(leaf)
            (slopes,) = torch.autograd.grad(found, leaf, torch.ones_like(found))
        ctx.save_for_backward(slopes)
        return found.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return cotangents[0] * slopes, None
