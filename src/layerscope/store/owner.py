"""Who executes a run, and whether that process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil

_SAME_PROCESS_S = 2.0  # clocks of the process table are coarse


@dataclass(frozen=True)
class Owner:
    """A process: host, process id, and when it started (seconds since the epoch)."""

    host: str
    pid: int
    process_started: float

    @staticmethod
    def current() -> Owner:
        """Return this process."""
        pid = os.getpid()
        return Owner(socket.gethostname(), pid, psutil.Process(pid).create_time())

    def is_dead(self) -> bool:
        """Say whether the process is known to be gone; False for one on another host."""
        return self.host == socket.gethostname() and not self._runs_here()

    def is_other_live_process(self) -> bool:
        """Say whether another process of this host still executes the run.

        A process on another host cannot be seen from here and never blocks anyone.
        """
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        return self._runs_here()

    def _runs_here(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) <= _SAME_PROCESS_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
