"""Configuration of a battery run: frozen, serialised with every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerscope.errors import ConfigError, nearest
from layerscope.experiments.layers import LayersConfig
from layerscope.measures.config import MeasureConfig

PARTS = (
    "wording",
    "paraphrases",
    "negation",
    "position",
    "punctuation",
    "roles",
    "novelty",
    "control",
    "permuted",
)
DERANGEMENT_BATCH = 50
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class BatteryConfig:
    """What to ask of each item, and how to read it.

    `parts` are the controls asked beside the plain question of every item: `wording` (without the
    filler word), `paraphrases`, `negation`, `position` (neutral tokens in front), `punctuation`,
    `roles` (reversed and wrong), `novelty` (invented subjects), `control` (the same question about
    France) and `permuted` (another item's answer). `lenses`, `artifacts`, `norm_choice`, `format`,
    `system`, `products`, `run_products` and `measures` are those of the layers experiment.
    `seed` decides the permutation of answers and the bootstrap, `resamples` how many of these.
    """

    lenses: tuple[str, ...] = ("raw", "norm")
    artifacts: Mapping[str, str | Path] = field(default_factory=dict[str, str | Path])
    parts: tuple[str, ...] = PARTS
    norm_choice: Literal["final", "next_norm"] = "final"
    format: Literal["auto", "raw", "chat"] = "auto"
    system: str | None = None
    measures: MeasureConfig = field(default_factory=MeasureConfig)
    products: Literal["default", "checked"] = "checked"
    run_products: Literal["default", "checked"] = "default"
    seed: int = 0
    resamples: int = 1000
    prompts_per_batch: int = 64
    batch_bytes: int = 256 * MIB  # activations of one batch, estimated from its longest prompt
    readout_bytes: int = 128 * MIB  # tiles of the readout

    def __post_init__(self) -> None:
        self.layers()  # checks the options that both share
        for name in self.parts:
            if name not in PARTS:
                raise ConfigError(
                    f"unknown part {name!r}{nearest(name, PARTS)}; known: {', '.join(PARTS)}"
                )
        if len(set(self.parts)) < len(self.parts):
            raise ConfigError("a part is named twice; name each once")
        for name in ("resamples", "prompts_per_batch", "batch_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def layers(self) -> LayersConfig:
        """Return the options that the layers experiment shares."""
        return LayersConfig(
            lenses=self.lenses,
            artifacts=self.artifacts,
            norm_choice=self.norm_choice,
            format=self.format,
            system=self.system,
            measures=self.measures,
            products=self.products,
            run_products=self.run_products,
            readout_bytes=self.readout_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON-able values."""
        artifacts = {name: str(path) for name, path in self.artifacts.items()}
        return asdict(self) | {"artifacts": artifacts}

    def content(self) -> dict[str, Any]:
        """Return what decides the bytes of a result: all but where fitted lenses lie."""
        return {name: value for name, value in self.to_dict().items() if name != "artifacts"}
