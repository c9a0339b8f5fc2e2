"""Python threads for the passes over logits, each with a share of torch's threads.

The passes are many short operations. On one set of data each would end with all of torch's threads
waiting for the slowest; on data of their own, threads never wait for each other, and the time that
Python takes between operations overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # more would wait for the interpreter lock


class Workers:
    """A pool that lives for one readout.

    Args:
        count: threads of the pool; with 1 everything runs in the calling thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def of(device: torch.device) -> Workers:
        """Return one worker per torch thread, up to a limit; one in all away from the CPU."""
        return Workers(min(torch.get_num_threads(), _MOST) if device.type == "cpu" else 1)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def map(
        self, work: Callable[[Item, int], Result], items: Sequence[Item], *, at_once: int
    ) -> list[Result]:
        """Return ``work(item, worker)`` of every item, in order; at most `at_once` run together.

        Worker w takes the items w, w + at_once, ... torch's number of threads is divided among the
        workers meanwhile; it is a setting of the whole process, and restored.
        """
        at_once = min(at_once, self.count, len(items))
        if at_once <= 1:
            return [work(item, 0) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count)
        threads = torch.get_num_threads()
        share = max(1, threads // at_once)

        def run(worker: int) -> list[Result]:
            torch.set_num_threads(share)  # of this thread
            with torch.no_grad():
                return [work(item, worker) for item in items[worker::at_once]]

        try:
            torch.set_num_threads(share)
            futures = [self._pool.submit(run, worker) for worker in range(at_once)]
            found = [future.result() for future in _settled(futures)]
        finally:
            torch.set_num_threads(threads)
        return [found[index % at_once][index // at_once] for index in range(len(items))]


def _settled(futures: list[Future[Result]]) -> list[Future[Result]]:
    """Wait for all, so that none still runs when the first error is raised."""
    for future in futures:
        future.exception()
    return futures
