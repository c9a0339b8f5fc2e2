"""MLPs in fewer operations than transformers writes them in, for passes over many rows on a CPU.

The same formulas, to rounding. Modules keep their hooks: whoever looks at the projections of an MLP
sees what is always there, and an MLP whose activation is looked at is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import (
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
    SiLUActivation,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from layerscope.models.backends.huggingface.structure import Block, Structure
from layerscope.models.backends.recording import current_run

_TANH_GELU = (NewGELUActivation, FastGELUActivation, GELUTanh)
_SILU = (nn.SiLU, SiLUActivation)
_GATED = LlamaMLP.forward.__code__


@contextmanager
def in_one_operation(run: object, structure: Structure) -> Generator[None]:
    """Let GELU in its tanh form be one operation, and a gate one with what it is multiplied with.

    What the widest tensors of a block cost is reading and writing them, once for each operation.
    """
    with ExitStack() as stack:
        for block in structure.blocks:
            if _is_gated(block):
                stack.enter_context(_gate(run, block.mlp.module))
            elif block.inner.activation and type(block.inner.activation.module) in _TANH_GELU:
                stack.enter_context(_gelu(run, block.inner.activation.module))
        yield


@functools.lru_cache(maxsize=1)
def _loops() -> ModuleType | None:
    try:
        from layerscope.products import elementwise
    except (ImportError, OSError):  # no numba, or none that goes with this numpy
        return None
    return elementwise


def _is_gated(block: Block) -> bool:
    """Return True for an MLP that is Llama's, instruction by instruction, and not looked into."""
    mlp, activation, loops = block.mlp.module, getattr(block.mlp.module, "act_fn", None), _loops()
    if loops is None or not isinstance(activation, nn.Module) or "forward" in vars(mlp):
        return False
    code = getattr(type(mlp).forward, "__code__", None)
    return (
        code is not None
        and (code.co_code, code.co_names) == (_GATED.co_code, _GATED.co_names)
        and type(activation) in (*_SILU, *_TANH_GELU)
        and not (activation._forward_hooks or activation._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        and "forward" not in vars(activation)
    )


@contextmanager
def _gate(run: object, mlp: Any) -> Generator[None]:
    loops, plain = _loops(), mlp.forward
    assert loops is not None
    multiply = loops.silu_gate if type(mlp.act_fn) in _SILU else loops.gelu_gate

    def forward(x: Tensor) -> Tensor:
        if current_run() is not run:
            return plain(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if loops.suits(gate, up) and gate.shape == up.shape:
            return mlp.down_proj(multiply(gate, up))
        return mlp.down_proj(mlp.act_fn(gate) * up)

    mlp.forward = forward
    try:
        yield
    finally:
        vars(mlp).pop("forward", None)  # another thread's run may have been here too


@contextmanager
def _gelu(run: object, activation: nn.Module) -> Generator[None]:
    wholes: list[Tensor] = []

    def empty(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        if current_run() is not run or len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        wholes.append(args[0])
        return (args[0][:, :0],)

    def compute(_module: nn.Module, _args: Any, _output: Any) -> Tensor | None:
        if current_run() is not run or not wholes:
            return None
        return _tanh_gelu(wholes.pop())

    # Others' hooks see whole tensors: theirs come before the first, and after the second.
    handles: list[RemovableHandle] = [
        activation.register_forward_pre_hook(empty),
        activation.register_forward_hook(compute, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tanh_gelu(value: Tensor) -> Tensor:
    loops = _loops()
    if loops is not None and loops.suits(value):
        return loops.gelu(value)
    return nn.functional.gelu(value, approximate="tanh")
