"""Run the benchmarks: ``python -m benchmarks [install] [NAME...]``.

Results go to benchmarks/results as JSON, and are printed as a table.

``install`` creates the peers' virtual environments first; peers that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import os

BENCHMARKS = ("readout", "capture", "lens", "layers", "load")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"install, {', '.join(BENCHMARKS)}")
    names: list[str] = parser.parse_args().names
    if "install" in names:
        from benchmarks.peers.environments import PEERS, install

        for peer in PEERS:
            install(peer)
    chosen = [name for name in names if name != "install"]
    if not names:
        chosen = list(BENCHMARKS)
    for name in chosen:
        report = importlib.import_module(f"benchmarks.bench_{name}").main()
        report.show()
        print(f"written to {report.save()}")


if __name__ == "__main__":
    main()
