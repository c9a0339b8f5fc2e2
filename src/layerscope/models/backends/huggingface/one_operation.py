"""Blocks in fewer operations than transformers writes them in, on a CPU.

For packed rows and for gradients of many cotangents: passes over so many numbers that reading and
writing them once for each operation is what costs time.

The same formulas, to rounding. Modules keep their hooks: whoever looks at the projections of an MLP
sees what is always there, and an MLP whose activation is looked at is left as it is. What a
family's modelling module writes is known by its instructions: those of Llama's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import (
    FastGELUActivation,
    GELUTanh,
    NewGELUActivation,
    SiLUActivation,
)
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)

from layerscope.models.backends.huggingface.hooks import Recorder
from layerscope.models.backends.huggingface.structure import Block, Structure
from layerscope.models.backends.huggingface.taps import Taps, names_of
from layerscope.models.backends.recording import current_run
from layerscope.models.batched_gradients import derivatives
from layerscope.models.batched_gradients import gate as gate_of
from layerscope.models.run import RunPlan

_TANH_GELU = (NewGELUActivation, FastGELUActivation, GELUTanh)
_SILU = (nn.SiLU, SiLUActivation)
_ROTARY, _HALF = "apply_rotary_pos_emb", "rotate_half"


def are_worth_it(plan: RunPlan) -> bool:
    """Return whether a run is one for these: of packed rows, or with batched gradients."""
    return plan.gradients == "batched" or (plan.packed is not None and not plan.gradients)


@contextmanager
def in_one_operation(run: Recorder, structure: Structure) -> Generator[None]:
    """Let norms, rotary embeddings and gates be one operation each, and GELU in its tanh form.

    What large tensors cost is reading and writing them, once for each operation.
    """
    start, stop = run.plan.start, run.plan.stop_after
    blocks = structure.blocks[start and start.layer : None if stop is None else stop + 1]
    with ExitStack() as stack:
        attentions = [block.attention.module for block in blocks]
        stack.enter_context(_ROTARY_TAPS.installed(filter(_rotates, attentions)))
        for block in blocks:
            for norm in filter(_is_rms_norm, block.whole.module.modules()):
                stack.enter_context(_norm(run, norm))
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


def _suiting(*values: Tensor) -> ModuleType | None:
    """Return loops for these values, those with gradients where any value has one."""
    loops = _loops()
    if loops is None or not loops.suits(*values):
        return None
    return derivatives() if _differentiable(*values) else loops


def _differentiable(*values: Tensor) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _is_gated(block: Block) -> bool:
    """Return True for an MLP that is Llama's, instruction by instruction, and not looked into."""
    mlp, activation, loops = block.mlp.module, getattr(block.mlp.module, "act_fn", None), _loops()
    if loops is None or not isinstance(activation, nn.Module) or "forward" in vars(mlp):
        return False
    return (
        _same(type(mlp).forward, LlamaMLP.forward)
        and type(activation) in (*_SILU, *_TANH_GELU)
        and not (activation._forward_hooks or activation._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        and "forward" not in vars(activation)
    )


@functools.lru_cache(maxsize=256)
def _same(function: object, known: Callable[..., Any]) -> bool:
    """Return whether a function is another one, instruction by instruction."""
    codes = getattr(function, "__code__", None), known.__code__
    mine, other = (
        code and (code.co_code, code.co_names, [c for c in code.co_consts if type(c) is not str])
        for code in codes
    )
    return mine == other


def _rotates(attention: nn.Module) -> bool:
    names = names_of(attention)
    known = _same(names.get(_ROTARY), apply_rotary_pos_emb)
    return _loops() is not None and known and _same(names.get(_HALF), rotate_half)


def _rotated(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        run = current_run()
        mine = isinstance(run, Recorder) and are_worth_it(run.plan)
        if mine and not args and not kwargs and len(q) == len(cos) == 1:
            tokens = [each.transpose(1, 2).squeeze(0) for each in (q, k)]
            whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
            whole = whole and not _differentiable(cos, sin)  # angles that are constants
            loops = _suiting(*tokens, cos, sin)
            if whole and loops is not None:
                turned = (loops.rotate(each, cos[0], sin[0]) for each in tokens)
                queries, keys = (each.transpose(0, 1)[None] for each in turned)
                return queries, keys
        return plain(q, k, cos, sin, *args, **kwargs)

    return rotary


_ROTARY_TAPS = Taps(_ROTARY, _rotated)


def _is_rms_norm(norm: nn.Module) -> bool:
    known = _same(type(norm).forward, LlamaRMSNorm.forward)
    return _loops() is not None and known and "forward" not in vars(norm)


@contextmanager
def _norm(run: Recorder, norm: Any) -> Generator[None]:
    plain = norm.forward

    def forward(hidden_states: Tensor) -> Tensor:
        # A gain of its own for every head is broadcast otherwise.
        one_gain = norm.weight.shape == hidden_states.shape[-1:]
        loops = _suiting(hidden_states, norm.weight) if one_gain else None
        if current_run() is not run or loops is None:
            return plain(hidden_states)
        return loops.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)

    norm.forward = forward
    try:
        yield
    finally:
        vars(norm).pop("forward", None)  # another thread's run may have been here too


@contextmanager
def _gate(run: Recorder, mlp: Any) -> Generator[None]:
    loops, plain = _loops(), mlp.forward
    assert loops is not None
    multiply = loops.silu_gate if type(mlp.act_fn) in _SILU else loops.gelu_gate

    def forward(x: Tensor) -> Tensor:
        if current_run() is not run:
            return plain(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if gate.shape == up.shape:
            if _differentiable(gate, up):
                return mlp.down_proj(gate_of(mlp.act_fn, gate, up))
            if loops.suits(gate, up):
                return mlp.down_proj(multiply(gate, up))
        return mlp.down_proj(mlp.act_fn(gate) * up)

    mlp.forward = forward
    try:
        yield
    finally:
        vars(mlp).pop("forward", None)  # another thread's run may have been here too


@contextmanager
def _gelu(run: Recorder, activation: nn.Module) -> Generator[None]:
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
    if loops is not None and loops.suits(value) and not _differentiable(value):
        return loops.gelu(value)
    return nn.functional.gelu(value, approximate="tanh")
