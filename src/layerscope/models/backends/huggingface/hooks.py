"""Hooks on the real modules for one run: read, edit, resume, stop, and leave nothing behind.

Hooks act only in the run that installed them: a run nested in an edit's function, a run in another
thread, or a call of the model by its owner passes through them untouched.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.views import Carried, View, Whole, first_tensor
from layerscope.models.backends.recording import Stop, current_run, edited_value
from layerscope.models.edits import take
from layerscope.models.run import PlannedCapture, PlannedEdit, RunPlan
from layerscope.models.sites import Site


@dataclass(frozen=True)
class Carrier:
    """A tensor that a module reads or gives, where hooks can reach it.

    Attributes:
        module: the module to hook.
        side: "input" or "output" of the module, or what its attention kernel reads and computes.
        item: which one, where the module reads or gives several.
        shared: an edit must also reach others who hold the same tensor (the skip connection), so it
            is written in place.
        call: which of the module's calls in a pass, where it is called more than once.
        copied: the model writes into this tensor later, so it goes on with a copy of what was kept.
        plus: a module called earlier whose output the model adds to this one; the carrier holds
            the sum.
    """

    module: nn.Module
    side: Literal["input", "output", "query", "key", "value", "scores", "pattern"]
    item: int = 0
    shared: bool = False
    call: int = 0
    copied: bool = False
    plus: nn.Module | None = None


@dataclass(frozen=True)
class Point:
    """Where a site lives: on a carrier, seen through a view."""

    carrier: Carrier
    view: View = field(default_factory=Whole)


class Recorder:
    """The state of one run: what has fired, and what was kept."""

    def __init__(self, plan: RunPlan, points: Callable[[Site], Point]) -> None:
        self.plan = plan
        self.activations: dict[Site, Tensor] = {}
        # Keys and values, past ones included, that edits replaced after the model stored them.
        self.exchanged: list[tuple[Tensor, Tensor]] = []
        # What modules gave whose output the model adds to that of a carrier called after them.
        self.summands: dict[nn.Module, Tensor] = {}
        # The attention that is read at the last token of every packed row alone.
        self.asks_at_ends: nn.Module | None = None
        self._fired: set[Carrier] = set()
        self._edits: dict[Carrier, list[tuple[PlannedEdit, View]]] = {}
        self._captures: dict[Carrier, list[tuple[PlannedCapture, View]]] = {}
        self._sites: dict[Carrier, list[Site]] = {}
        self._kept: list[tuple[Site, Tensor, int]] = []
        for edit in plan.edits:
            point = points(edit.site)
            self._edits.setdefault(point.carrier, []).append((edit, point.view))
            self._sites.setdefault(point.carrier, []).append(edit.site)
        for capture in plan.captures:
            point = points(capture.site)
            self._captures.setdefault(point.carrier, []).append((capture, point.view))
            self._sites.setdefault(point.carrier, []).append(capture.site)

    @property
    def carriers(self) -> list[Carrier]:
        """Every carrier that this run reads or edits."""
        return list(self._sites)

    def visit(self, carrier: Carrier, value: Tensor, source: Tensor | None = None) -> Tensor:
        """Edit what a module carries and keep what is wanted; return what the model goes on with.

        Edits of sites that lie in one tensor (a head, all heads) act in the order of the run.
        """
        self._fired.add(carrier)
        n_rows = len(self.plan.batch)
        for planned, view in self._edits.get(carrier, ()):
            carried = Carried(value, source, n_rows)
            site_value = view.read(carried)
            edited = edited_value(site_value, planned, self.plan)
            if edited is not site_value:
                value = view.write(carried, edited)
        for capture, view in self._captures.get(carrier, ()):
            carried = Carried(value, source, n_rows)
            site_value = view.read(carried)
            # The model goes on with what was captured, so that gradients reach it.
            exchange = site_value is not value and site_value.is_floating_point()
            exchange = exchange and self.plan.gradients
            if exchange and carrier.shared:
                # What is written in place must not be a view of what is overwritten.
                site_value = site_value.clone()
            self._keep(capture, site_value)
            if exchange:
                value = view.write(carried, site_value)
        if carrier.copied and carrier in self._captures:
            value = value.clone()
        return value

    def edits(self, carrier: Carrier) -> bool:
        """Return True when the run edits what this carrier holds."""
        return carrier in self._edits

    def wants(self, carrier: Carrier) -> bool:
        """Return True when the run reads or edits what this carrier holds."""
        return carrier in self._sites

    def finish(self) -> dict[Site, Tensor]:
        """Return the activations.

        Raises:
            ModelError: a site never fired, or the model overwrote a tensor that was kept.
        """
        silent = [
            str(site)
            for carrier, sites in self._sites.items()
            if carrier not in self._fired
            for site in dict.fromkeys(sites)
        ]
        if silent:
            raise ModelError(
                f"the forward pass never reached {', '.join(silent)}; this model does not call "
                "those modules, so run `layerscope check` on it"
            )
        for site, value, version in self._kept:
            if value._version != version:  # pyright: ignore[reportPrivateUsage]
                raise ModelError(
                    f"the model overwrote its activation at {site} after it was captured; capture "
                    "it with positions, a device or a dtype, which copies it"
                )
        return self.activations

    def _keep(self, capture: PlannedCapture, value: Tensor) -> None:
        if not self.plan.gradients:
            value = value.detach()
        kept = value
        if capture.columns is not None:
            columns = capture.columns.to(value.device)
            rows = torch.arange(value.shape[0], device=value.device)
            kept = take(value, rows, columns, capture.site.pos_axis)
        kept = kept.to(
            device=kept.device if capture.device is None else capture.device,
            dtype=kept.dtype if capture.dtype is None else capture.dtype,
        )
        if kept is value and not value.is_inference():
            self._kept.append((capture.site, value, value._version))  # pyright: ignore[reportPrivateUsage]
        self.activations[capture.site] = kept


@contextmanager
def installed(recorder: Recorder, carriers: Iterable[Carrier]) -> Generator[None]:
    """Keep hooks on the given carriers' modules, in their order."""
    handles: list[RemovableHandle] = []
    try:
        for carrier in carriers:
            module = carrier.module
            if carrier.side == "input":
                hook = _input_hook(recorder, carrier)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif carrier.side == "output":
                if carrier.plus is not None:
                    summand = _summand_hook(recorder, carrier.plus)
                    handles.append(carrier.plus.register_forward_hook(summand))
                hook = _output_hook(recorder, carrier)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopping_after(run: object, block: nn.Module | None) -> Generator[None]:
    """End the forward pass once `block` has run (and its other hooks have)."""
    if block is None:
        yield
        return

    def stop(_module: nn.Module, _args: Any, _output: Any) -> None:
        if current_run() is run:
            raise Stop

    handle = block.register_forward_hook(stop)
    try:
        yield
    except Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def narrowed(
    run: object, modules: Iterable[nn.Module], columns: Int[Tensor, "batch pos"]
) -> Generator[None]:
    """Let modules that treat every position alone compute some columns; the others become zero.

    A module that reads something beside the activation, or reads it flattened, computes all.
    """
    widths: dict[nn.Module, int] = {}

    def pick(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if current_run() is not run or kwargs is None:
            return None
        value = _first_tensor(args, kwargs)
        tensors = sum(isinstance(given, Tensor) for given in (*args, *kwargs.values()))
        if value.ndim != 3 or value.shape[0] != columns.shape[0] or tensors > 1:
            return None
        widths[module] = value.shape[1]
        rows = torch.arange(value.shape[0], device=value.device)[:, None]
        return _with_input(args, kwargs, value[rows, columns.to(value.device)])

    def spread(module: nn.Module, _args: Any, output: Any) -> Any:
        width = widths.pop(module, None) if current_run() is run else None
        if width is None:
            return None
        value = first_tensor(output)
        whole = value.new_zeros(value.shape[0], width, *value.shape[2:])
        rows = torch.arange(value.shape[0], device=value.device)[:, None]
        whole[rows, columns.to(value.device)] = value
        return whole if not isinstance(output, tuple) else (whole, *output[1:])

    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(pick, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(spread))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Resume:
    """Starts a model in the middle: earlier blocks pass their input on instead of computing.

    A block's forward can only be skipped by standing in for it. The stand-in is there while some
    run resumes, asks whose pass it is in, and calls the real forward in every other.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._lock = threading.Lock()
        self._first_block: dict[object, int] = {}
        self._undo: list[Callable[[], None]] = []
        # Length of the tuple that blocks return, 0 for a tensor; None until one was seen.
        self._tuple_size: int | None = None

    @contextmanager
    def watching(self) -> Generator[None]:
        """Learn from a full pass what a block returns, so that a stand-in can return the same."""
        if self._tuple_size is not None:
            yield
            return

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            self._tuple_size = _tuple_size(output)

        handle = self._blocks[0].register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def at(
        self, run: object, layer: int, residual: Float[Tensor, "batch pos d_model"]
    ) -> Generator[None]:
        """Hand block `layer` the stored residual, in the pass of `run` alone."""

        def replace_input(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
        ) -> Any:
            # Without kwargs: torch calls so when the hook is removed while another thread's pass,
            # which it does not concern, is about to call it.
            if current_run() is not run or kwargs is None:
                return None
            return _with_input(args, kwargs, residual.to(_first_tensor(args, kwargs)))

        # Before every other hook of the block: those must see what the block will read.
        handle = self._blocks[layer].register_forward_pre_hook(
            replace_input, with_kwargs=True, prepend=True
        )
        try:
            self._enter(run, layer)
            yield
        finally:
            self._leave(run)
            handle.remove()

    def _enter(self, run: object, layer: int) -> None:
        with self._lock:
            first = not self._first_block
            self._first_block[run] = layer
            if first:
                for index, block in enumerate(self._blocks):
                    self._stand_in(index, block)

    def _leave(self, run: object) -> None:
        with self._lock:
            self._first_block.pop(run, None)
            if not self._first_block:
                while self._undo:
                    self._undo.pop()()

    def _stand_in(self, index: int, block: nn.Module) -> None:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = current_run()
            if run is None or index >= self._first_block.get(run, 0):
                return original(*args, **kwargs)
            if self._tuple_size is None:  # no full pass yet: compute this block, and discard it
                self._tuple_size = _tuple_size(original(*args, **kwargs))
            passed = _first_tensor(args, kwargs)
            return (passed, *[None] * (self._tuple_size - 1)) if self._tuple_size else passed

        # Past __setattr__, which TransformerLens' wrappers of a block pass on to what they wrap.
        own = block.__dict__
        if "forward" in own:  # someone else's stand-in (accelerate's, say) comes back
            self._undo.append(lambda: own.update(forward=original))
        else:
            self._undo.append(lambda: own.pop("forward"))
        own["forward"] = forward


def _input_hook(recorder: Recorder, carrier: Carrier) -> Callable[..., Any]:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Without kwargs: another thread's pass, as in `Resume.at`.
        if current_run() is not recorder or kwargs is None:
            return None
        if carrier.item:
            # Read only: the numbers of chosen experts, say.
            recorder.visit(carrier, args[carrier.item])
            return None
        value = _first_tensor(args, kwargs)
        edited = recorder.visit(carrier, value)
        if edited is value:
            return None
        if carrier.shared:
            # In place: the skip connection holds the same tensor. Nothing but the two reads it.
            value.copy_(edited)
            return None
        return _with_input(args, kwargs, edited)

    return hook


def _output_hook(recorder: Recorder, carrier: Carrier) -> Callable[..., Any]:
    calls = itertools.count()

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None
    ) -> Any:
        # Without an output: another thread's pass, which torch calls without kwargs.
        if current_run() is not recorder or output is None:
            return None
        if carrier.call and next(calls) != carrier.call:
            return None
        value = first_tensor(output, carrier.item)
        if carrier.plus is None:
            edited = recorder.visit(carrier, value, _source(args, kwargs))
        else:
            edited = _visit_sum(recorder, carrier, value)
        if edited is value:
            return None
        if not isinstance(output, tuple):
            return edited
        return (*output[: carrier.item], edited, *output[carrier.item + 1 :])

    return hook


def _summand_hook(recorder: Recorder, module: nn.Module) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if current_run() is not recorder:
            return None
        recorder.summands[module] = first_tensor(output)
        # Gradients reach this module through the sum, not past it.
        return output.detach() if recorder.plan.gradients else None

    return hook


def _visit_sum(recorder: Recorder, carrier: Carrier, value: Tensor) -> Tensor:
    """Let a run see the sum of two outputs; return what makes the model's own sum the edited one.

    Where nothing was edited the numbers stay the model's own, to the last bit.
    """
    assert carrier.plus is not None
    other = recorder.summands.pop(carrier.plus, None)
    if other is None:
        raise ModelError("a branch of this model adds its parts in another order than layerscope")
    total = other + value
    edited = recorder.visit(carrier, total)
    if edited is total and not recorder.plan.gradients:
        return value
    passed = torch.where(edited == total, value, edited - other).detach()
    return passed + (edited - edited.detach())


def _source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def _tuple_size(output: Any) -> int:
    return len(output) if isinstance(output, tuple) else 0


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a module reads: its first positional argument, or ``hidden_states``."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise ModelError("a block or sublayer of this model does not take hidden_states first")
    return value


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": value}
