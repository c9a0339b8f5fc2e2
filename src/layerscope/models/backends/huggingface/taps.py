"""Names in transformers' modelling modules that stand for something else while runs need it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


class Taps:
    """One name, in as many modelling modules as runs look into.

    Args:
        name: global in a modelling module.
        tap: given what the name stands for, returns what it stands for meanwhile.
    """

    def __init__(self, name: str, tap: Callable[[Any], Any]) -> None:
        self._name, self._tap = name, tap
        self._lock = threading.Lock()
        self._users: dict[int, tuple[dict[str, Any], Any, int]] = {}

    @contextmanager
    def installed(self, modules: Iterable[nn.Module]) -> Generator[None]:
        """Exchange the name for what these modules' forward functions see; restored after."""
        spaces = list({id(names): names for names in map(names_of, modules)}.values())
        entered: list[dict[str, Any]] = []
        try:
            for names in spaces:
                self._enter(names)
                entered.append(names)
            yield
        finally:
            for names in entered:
                self._leave(names)

    def _enter(self, names: dict[str, Any]) -> None:
        with self._lock:
            _, real, users = self._users.get(id(names), (names, names[self._name], 0))
            self._users[id(names)] = (names, real, users + 1)
            if users == 0:
                names[self._name] = self._tap(real)

    def _leave(self, names: dict[str, Any]) -> None:
        with self._lock:
            _, real, users = self._users[id(names)]
            if users == 1:
                names[self._name] = real
                del self._users[id(names)]
            else:
                self._users[id(names)] = (names, real, users - 1)


def names_of(module: nn.Module) -> dict[str, Any]:
    """Return the global names that a module's forward function sees."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})
