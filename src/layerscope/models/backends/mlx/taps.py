"""Modules that ask the current run, for the length of a run.

A module of interest gets a subclass of its own class whose call goes through the run of this
thread, and gets its class back afterwards. The object, its place in the tree, its attributes and
its arrays stay the same, so parents may read whatever they like from a tapped child. Calls outside
the run (another thread's, the owner's, one nested in an edit's function) go straight to the class.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

from mlx import nn

from layerscope.models.backends.recording import current_run

KERNEL = "scaled_dot_product_attention"


@runtime_checkable
class Listener(Protocol):
    """A run that wants to see the calls of its modules and attention kernels."""

    def call(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stand for ``original(module, *args, **kwargs)``."""
        ...

    def kernel(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand for ``original(*args, **kwargs)``, an attention kernel."""
        ...


class Taps:
    """Counts who needs a module tapped, or a kernel's name exchanged; all models and threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modules: dict[int, tuple[nn.Module, type, int]] = {}
        self._kernels: dict[int, tuple[dict[str, Any], Any, int]] = {}

    @contextmanager
    def installed(
        self, modules: Iterable[nn.Module], attentions: Iterable[nn.Module] = ()
    ) -> Generator[None]:
        """Let these modules, and the kernels of these attention modules, ask the current run."""
        tapped: list[nn.Module] = []
        spaces: list[dict[str, Any]] = []
        try:
            with self._lock:
                for names in {id(n): n for n in map(self._names, attentions)}.values():
                    self._enter_kernel(names)
                    spaces.append(names)
                for module in {id(m): m for m in modules}.values():
                    self._enter(module)
                    tapped.append(module)
            yield
        finally:
            with self._lock:
                for module in reversed(tapped):
                    self._leave(module)
                for names in spaces:
                    self._leave_kernel(names)

    def class_of(self, module: nn.Module) -> type:
        """Return the module's own class, tapped or not."""
        known = self._modules.get(id(module))
        return type(module) if known is None else known[1]

    def has_kernel(self, attention: nn.Module) -> bool:
        """Return True when the attention module calls the kernel by its usual name."""
        return KERNEL in self._names(attention)

    def _names(self, attention: nn.Module) -> dict[str, Any]:
        return getattr(self.class_of(attention).__call__, "__globals__", {})

    def _enter(self, module: nn.Module) -> None:
        _, own, users = self._modules.get(id(module), (module, type(module), 0))
        self._modules[id(module)] = (module, own, users + 1)
        if users == 0:
            object.__setattr__(module, "__class__", _tapped_class(own))

    def _leave(self, module: nn.Module) -> None:
        _, own, users = self._modules[id(module)]
        if users > 1:
            self._modules[id(module)] = (module, own, users - 1)
            return
        del self._modules[id(module)]
        object.__setattr__(module, "__class__", own)

    def _enter_kernel(self, names: dict[str, Any]) -> None:
        _, real, users = self._kernels.get(id(names), (names, names.get(KERNEL), 0))
        if real is None:
            return
        self._kernels[id(names)] = (names, real, users + 1)
        if users == 0:
            names[KERNEL] = partial(_tapped_kernel, real)

    def _leave_kernel(self, names: dict[str, Any]) -> None:
        if id(names) not in self._kernels:
            return
        _, real, users = self._kernels[id(names)]
        if users > 1:
            self._kernels[id(names)] = (names, real, users - 1)
            return
        del self._kernels[id(names)]
        names[KERNEL] = real


TAPS = Taps()
"""One for all models: the models of a family share the names that their kernels are called by."""


@cache
def _tapped_class(own: type) -> type:
    """Return a subclass of a module's class whose call asks the current run."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original: Callable[..., Any] = own.__call__  # the owner may have exchanged it
        run = current_run()
        if isinstance(run, Listener):
            return run.call(self, original, args, kwargs)
        return original(self, *args, **kwargs)

    names = {"__call__": call, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own,), names)


def _tapped_kernel(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = current_run()
    if isinstance(run, Listener):
        return run.kernel(original, args, kwargs)
    return original(*args, **kwargs)
