"""The one large buffer of a readout, which the next readout may have."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.allocator import LARGEST_KEPT, keeps_freed_memory

_lock = threading.Lock()
_free: list[Tensor] = []  # one at most


@contextmanager
def lent(n: int, device: torch.device) -> Generator[Float[Tensor, " n"]]:
    """Lend memory for n floats.

    Where the process keeps freed memory, what is too large for the C library to keep is kept here,
    so that the next readout does not fault the same pages in again. Never more than one.
    """
    if device.type != "cpu" or 4 * n <= LARGEST_KEPT or not keeps_freed_memory():
        yield torch.empty(n, device=device)
        return
    with _lock:
        found = next((each for each in _free if each.numel() >= n), None)
        _free.clear()
    if found is None:
        with torch.inference_mode(False):  # whoever has it next may not be in that mode
            found = torch.empty(n)
    try:
        yield found[:n]
    finally:
        with _lock:
            _free[:] = [found]
