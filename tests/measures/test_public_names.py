from __future__ import annotations

import subprocess
import sys

from layerscope import measures


def test_every_public_name_can_be_had() -> None:
    for name in measures.__all__:
        assert getattr(measures, name).__name__ == name
    assert set(measures.__all__) == set(dir(measures))


def test_measuring_needs_no_torch_and_its_name_costs_nothing() -> None:
    lines = (
        "import sys, layerscope.measures, layerscope.measures.tokens",
        "assert 'polars' not in sys.modules",
        "from layerscope.measures import *",
        "assert not {'torch', 'transformers'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
