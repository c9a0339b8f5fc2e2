"""Settings of the whole suite; set before anything imports torch."""

from __future__ import annotations

import os

# Tiny products gain nothing from threads, and lose a factor of ten when workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
