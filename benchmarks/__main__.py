"""Run the benchmarks: ``python -m benchmarks [install [PEER...]] [NAME...]``.

Results go to benchmarks/results as JSON, and are printed as a table.

``install`` creates the virtual environments of the named peers first, or of all; peers that are not
installed are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import os

from benchmarks.peers.environments import PEERS, install

BENCHMARKS = (
    "readout",
    "capture",
    "lens",
    "layers",
    "load",
    "hooks",
    "generate",
    "fit",
    "pathways",
    "pathways_memory",
    "patching",
    "battery",
)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"install, {', '.join(BENCHMARKS)}")
    names: list[str] = parser.parse_args().names
    if "install" in names:
        for peer in [name for name in names if name in PEERS] or PEERS:
            install(peer)
    chosen = [name for name in names if name != "install" and name not in PEERS]
    if not names:
        chosen = list(BENCHMARKS)
    for name in chosen:
        report = importlib.import_module(f"benchmarks.bench_{name}").main()
        report.show()
        print(f"written to {report.save()}")


if __name__ == "__main__":
    main()
