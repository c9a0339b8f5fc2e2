"""Fitting lenses on text: prism, tuned, temperature, Jacobian.

One call reads the text, fits, measures on held-out text and stores the artifact::

    from layerscope.lenses import load_lens
    from layerscope.lenses.fitting import DataConfig, fit_lens

    data = DataConfig(tokens=100_000)
    result = fit_lens("tuned", model, "stories.jsonl", "lenses/tuned", data=data)
    print(result.kl_bits["tuned"], result.kl_bits["norm"], result.warnings)
    lens = load_lens("lenses/tuned", model)
"""

from __future__ import annotations

from layerscope.lenses.fitting.corpus import DataConfig
from layerscope.lenses.fitting.drive import Progress
from layerscope.lenses.fitting.fit import KINDS, FitResult, Kind, fit_lens
from layerscope.lenses.fitting.jacobian import JacobianOptions
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.prism import PrismOptions
from layerscope.lenses.fitting.text import TextSource

__all__ = [
    "KINDS",
    "DataConfig",
    "FitResult",
    "JacobianOptions",
    "Kind",
    "PrismOptions",
    "Progress",
    "TextSource",
    "TunedOptions",
    "fit_lens",
]
