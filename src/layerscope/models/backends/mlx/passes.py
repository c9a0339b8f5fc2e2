"""One forward pass through an mlx-lm model: what its modules and kernels are asked to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn
from torch import Tensor

from layerscope.errors import ModelError
from layerscope.models.backends.mlx.arrays import to_mlx, to_torch
from layerscope.models.backends.mlx.cache import KeysAndValues, LayerCache
from layerscope.models.backends.mlx.kernel import KernelCall, KernelShape
from layerscope.models.backends.mlx.layout import Layout
from layerscope.models.backends.mlx.recorder import Carrier
from layerscope.models.backends.mlx.structure import Block, Named, Structure, linear_shape
from layerscope.models.backends.recording import Stop


class Watcher(Protocol):
    """What a pass reports to: a `Recorder`, or nobody."""

    def wants(self, carrier: Carrier) -> bool:
        """Return True for what it reads or edits."""
        ...

    def visit(self, carrier: Carrier, value: Tensor, source: Tensor | None = None) -> Tensor:
        """Return what the model goes on with."""
        ...


class Nobody:
    """Wants nothing."""

    def wants(self, carrier: Carrier) -> bool:
        """Return False."""
        return False

    def visit(self, carrier: Carrier, value: Tensor, source: Tensor | None = None) -> Tensor:
        """Return the value."""
        return value


class Pass:
    """Stands between a model and its modules while one run is in it.

    Args:
        structure: the model's parts.
        layout: columns of the run.
        watcher: what wants to see and edit values.
        past: keys and values to go on from, by block.
        start: first block to compute, and what it reads.
        stop_after: module after which the pass ends, with what it gave in `given`.
        shapes: filled with what the kernels read, where one is given.
    """

    def __init__(
        self,
        structure: Structure,
        layout: Layout,
        watcher: Watcher,
        *,
        past: Sequence[KeysAndValues] | None = None,
        start: tuple[int, mx.array] | None = None,
        stop_after: nn.Module | None = None,
        shapes: dict[int, KernelShape] | None = None,
    ) -> None:
        self._structure = structure
        self._layout = layout
        self._watcher = watcher
        self._start = start
        self._stop_after = stop_after
        self._shapes = shapes
        self.given: mx.array | None = None
        self.caches = [
            LayerCache(layout, None if past is None else past[index], self._visitor(block))
            for index, block in enumerate(structure.blocks)
        ]
        # Where this thread's pass is: the block whose attention runs, and what it has read so far.
        self._attending: int | None = None
        self._mask: Any = None
        self._query: Tensor | None = None
        self._names = {id(part.module): part.name for part in parts(structure)}
        self._blocks = {id(b.whole.module): i for i, b in enumerate(structure.blocks)}
        self._attentions = {id(b.attention.module): i for i, b in enumerate(structure.blocks)}

    def call(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module as the run wants it."""
        name = self._names.get(id(module))
        if name is None:  # of another model
            return original(module, *args, **kwargs)
        if not args:  # gave all by name
            given = inspect.signature(original).bind(module, **kwargs)
            args, kwargs = given.args[1:], given.kwargs
        index = self._blocks.get(id(module))
        if index is not None and self._start is not None and index <= self._start[0]:
            if index < self._start[0]:
                return args[0]
            args = (self._start[1], *args[1:])
        positions = self._structure.position_embedding
        if positions is not None and module is positions.module:
            # Padding may lie beyond the last position, where MLX would read what is not there.
            args = (mx.minimum(args[0], linear_shape(module)[0] - 1), *args[1:])
        args = self._read(name, args)
        attention = self._attentions.get(id(module))
        if attention is not None:
            output = self._attend(attention, module, original, args, kwargs)
        else:
            args = self._before_out(module, args)
            output = self._rotated(module, original(module, *args, **kwargs))
        output = self._gave(name, args, output)
        if module is self._stop_after:
            self.given = output
            raise Stop
        return output

    def kernel(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call an attention kernel as the run wants it."""
        if self._attending is None:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs)
        at = given.arguments
        block = self._structure.blocks[self._attending]
        query = Carrier(block.attention.name, "query")
        at["queries"] = self._visit(query, at["queries"], 2)
        output = original(*given.args, **given.kwargs)
        if not self._weighs(block):
            return output
        sinks = at.get("sinks")
        call = KernelCall(
            to_torch(at["queries"]),
            to_torch(at["keys"]),
            to_torch(at["values"]),
            float(at["scale"]),
            at["mask"],
            sinks=None if sinks is None else to_torch(sinks),
        )
        return self._weigh(block, call, output)

    def _read(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Show what a module reads; return the arguments that it is called with."""
        shared, own = Carrier(name, "input", shared=True), Carrier(name, "input")
        if self._watcher.wants(shared):
            value = self._visit(shared, args[0])
            if value is not args[0]:
                # The block holds this very array, and will add to it what its MLP gives.
                args[0][...] = value
        if self._watcher.wants(own):
            args = (self._visit(own, args[0]), *args[1:])
        return args

    def _gave(self, name: str, args: tuple[Any, ...], output: Any) -> Any:
        """Show what a module gave; return what the model goes on with."""
        carrier = Carrier(name, "output")
        if not self._watcher.wants(carrier):
            return output
        if not isinstance(output, mx.array):
            raise ModelError(f"{name} gives no array; this model is not one layerscope can read")
        source = None
        if isinstance(args[0], mx.array) and args[0].ndim == 3:
            source = self._layout.to_caller(to_torch(args[0]))
        return self._visit(carrier, output, source=source)

    def _attend(
        self,
        index: int,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call an attention module with the mask that its block needs."""
        block = self._structure.blocks[index]
        given = inspect.signature(original).bind(module, *args, **kwargs)
        layout = self._layout
        # mlx-lm's own mask is right where there is no past, and no window that it leaves out.
        windowed = block.window is not None and layout.hides(block.window)
        if layout.past is not None or windowed:
            grouped = self._structure.family.own_attention
            mask = layout.mask(block.window, array=grouped)
            if grouped and isinstance(mask, mx.array) and mask.ndim == 4:
                mask = mask[:, :, None] if getattr(module, "repeats", 1) > 1 else mask
            given.arguments["mask"] = mask
        self._attending, self._mask, self._query = index, given.arguments.get("mask"), None
        try:
            return original(*given.args, **given.kwargs)
        finally:
            self._attending = self._mask = self._query = None

    def _own(self, module: nn.Module, part: str) -> Block | None:
        """Return the block whose attention runs, if it calls no kernel and `module` is a part."""
        if self._attending is None or not self._structure.family.own_attention:
            return None
        block = self._structure.blocks[self._attending]
        named = block.rope if part == "rope" else block.out
        return block if named is not None and module is named.module else None

    def _rotated(self, module: nn.Module, output: Any) -> Any:
        """Show the queries of attention that calls no kernel: what is rotated first."""
        block = self._own(module, "rope")
        if block is None or self._query is not None:
            return output
        output = self._visit(Carrier(block.attention.name, "query"), output, 2)
        self._query = to_torch(output)
        return output

    def _before_out(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Show the pattern of attention that calls no kernel, before its output projection."""
        block = self._own(module, "out")
        if block is None or not self._weighs(block):
            return args
        assert self._attending is not None and self._query is not None
        fetched = self.caches[self._attending].fetched
        assert fetched is not None
        attention: Any = block.attention.module
        call = KernelCall(
            self._query,
            to_torch(fetched[0]),
            to_torch(fetched[1]),
            float(attention.scale),
            self._mask,
            softcap=float(attention.attn_logit_softcapping),
        )
        flat: mx.array = args[0]
        z = flat.reshape(*flat.shape[:2], self._query.shape[1], -1).transpose(0, 2, 1, 3)
        changed = self._weigh(block, call, z)
        if changed is z:
            return args
        return (changed.transpose(0, 2, 1, 3).reshape(flat.shape), *args[1:])

    def _weighs(self, block: Block) -> bool:
        """Return True when the run looks at scores or patterns of this block."""
        name = block.attention.name
        sides = (Carrier(name, "scores"), Carrier(name, "pattern"))
        return self._shapes is not None or any(map(self._watcher.wants, sides))

    def _weigh(self, block: Block, call: KernelCall, output: mx.array) -> mx.array:
        """Show scores and pattern; return the kernel's output, exchanged where they changed."""
        assert self._attending is not None
        fetched = self.caches[self._attending].fetched
        # Latent attention stores something else than what its kernel reads.
        if self._shapes is not None and fetched and fetched[0].shape == tuple(call.key.shape):
            self._shapes[self._attending] = call.shape(to_torch(output))
        name = block.attention.name
        scores_at, pattern_at = Carrier(name, "scores"), Carrier(name, "pattern")
        scores = call.scores()
        plain = edited = call.pattern(scores)
        if self._watcher.wants(scores_at):
            changed = self._visit_weights(scores_at, scores)
            if changed is not scores:
                edited = call.pattern(changed)
        if self._watcher.wants(pattern_at):
            edited = self._visit_weights(pattern_at, edited)
        if edited is plain:
            return output
        # Queries whose pattern stays keep what the kernel gave.
        moved = (edited != plain).any(dim=-1, keepdim=True)
        mixed = to_mlx(call.mix(edited), output.dtype)
        return mx.where(to_mlx(moved), mixed, output)

    def _visit(
        self, carrier: Carrier, value: mx.array, axis: int = 1, source: Tensor | None = None
    ) -> mx.array:
        """Let the watcher see, and change, a value with positions on this axis."""
        if not self._watcher.wants(carrier):
            return value
        seen = self._layout.to_caller(to_torch(value), axis)
        edited = self._watcher.visit(carrier, seen, source)
        if edited is seen:
            return value
        return to_mlx(self._layout.to_model(edited, axis), value.dtype)

    def _visit_weights(self, carrier: Carrier, value: Tensor) -> Tensor:
        seen = self._layout.weights_to_caller(value)
        edited = self._watcher.visit(carrier, seen)
        return value if edited is seen else self._layout.weights_to_model(edited)

    def _visitor(self, block: Block) -> Callable[[mx.array, mx.array], KeysAndValues]:
        name = block.attention.name

        def visit(keys: mx.array, values: mx.array) -> KeysAndValues:
            keys = self._visit(Carrier(name, "key"), keys, 2)
            return keys, self._visit(Carrier(name, "value"), values, 2)

        return visit


def parts(structure: Structure) -> list[Named]:
    """Return every part of a model that has a name; one that has two goes by the last."""
    found = [structure.embedding, structure.position_embedding, structure.final_norm]
    for block in structure.blocks:
        found += [getattr(block, field.name) for field in fields(block) if field.name != "window"]
    return [part for part in found if part is not None]
