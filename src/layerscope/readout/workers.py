"""Threads that share the work of a readout, each on data of its own.

The passes are many short operations. On one set of data, each would end with all of torch's threads
waiting for the slowest; on data of their own, threads never wait for each other, and the time that
Python takes between operations overlaps. The products are shared out in the same way.

Threads that torch starts for one operation keep their cores busy for a while after it, so that
others beside them come to their share late. Where torch's own can be asked they are the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from layerscope.products import openmp

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # more would wait for the interpreter lock


class Workers:
    """Those who work on one readout.

    While it is open, torch uses one thread for each operation (more only if there are more than
    the pool can take). torch's number of threads is a setting of the whole process; it is restored
    on leaving.

    Args:
        threads: how many threads torch may use; None leaves torch alone, and runs everything in
            the calling thread.
    """

    def __init__(self, threads: int | None) -> None:
        self._threads, self.threads = threads, threads or 1
        self.count = min(threads or 1, _MOST)
        self._share = max(1, (threads or 1) // _MOST)
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def of(device: torch.device) -> Workers:
        """Return one worker per torch thread, up to a limit; none away from the CPU."""
        return Workers(torch.get_num_threads() if device.type == "cpu" else None)

    def __enter__(self) -> Workers:
        if self._threads is not None:
            torch.set_num_threads(self._share)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)  # nothing runs any more: `map` waits for its items
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def map(
        self, work: Callable[[Item, int], Result], items: Sequence[Item], *, at_once: int
    ) -> list[Result]:
        """Return ``work(item, worker)`` of every item, in order; at most `at_once` run together.

        Worker w takes the items w, w + at_once, ...
        """
        at_once = min(at_once, self.count, len(items))
        if at_once <= 1:
            return [work(item, 0) for item in items]

        inference = torch.is_inference_mode_enabled()

        def run(worker: int) -> list[Result]:
            # Both are settings of the thread, and leaving inference mode turns gradients on.
            with torch.inference_mode(inference), torch.no_grad():
                return [work(item, worker) for item in items[worker::at_once]]

        # torch's own threads would use no others inside an operation.
        ask = self._on_torch if openmp.available() and self._share == 1 else self._on_pool
        found = ask(run, at_once)
        return [found[index % at_once][index // at_once] for index in range(len(items))]

    @staticmethod
    def _on_torch(run: Callable[[int], list[Result]], at_once: int) -> list[list[Result]]:
        found: list[list[Result] | None] = [None] * at_once
        errors: list[BaseException] = []
        left = iter(range(at_once))

        def take() -> None:
            try:
                for worker in left:
                    found[worker] = run(worker)
            except BaseException as error:
                errors.append(error)

        openmp.call(take, threads=at_once)
        if errors:
            raise errors[0]
        done = [results for results in found if results is not None]
        if len(done) < at_once:
            raise KeyboardInterrupt  # came between the call from C and the first line of `take`
        return done

    def _on_pool(self, run: Callable[[int], list[Result]], at_once: int) -> list[list[Result]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count - 1)

        def apart(worker: int) -> list[Result]:
            torch.set_num_threads(self._share)  # of the thread that this runs in
            return run(worker)

        futures = [self._pool.submit(apart, worker) for worker in range(1, at_once)]
        try:
            found = [run(0)]
        finally:
            _settle(futures)
        return found + [future.result() for future in futures]


def _settle(futures: Sequence[Future[Result]]) -> None:
    """Wait for all, so that none still runs when an error is raised."""
    for future in futures:
        future.exception()
