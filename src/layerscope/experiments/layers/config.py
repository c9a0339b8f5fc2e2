"""Configuration of the layers experiment: frozen, serialised with every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerscope.errors import ConfigError, nearest
from layerscope.lenses.find import ALL_LENSES, AUTO, FITTED_NAMES
from layerscope.measures.config import MeasureConfig

LENSES = ("raw", "norm")
CHOICES = (*ALL_LENSES, AUTO)
PROMPT_FORMATS = ("auto", "raw", "chat")
DIAGNOSTICS = ("none", "standard", "full")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """What to decode, with which lenses, and how large a step may be.

    `lenses` are names: `raw`, `norm`, the fitted ones (`temperature`, `bias`, `prism`, `tuned`,
    `jacobian`), or `auto` for raw, norm and every fitted one there is for the model. `artifacts`
    gives the folders of fitted lenses by name; those without one are looked for where
    `layerscope fit` puts them.
    `norm_choice` is `final` (the final norm everywhere, as in the literature) or `next_norm` (the
    input norm of the next block, a compatibility mode). `products` names the matrix product of the
    readout, `run_products` that of the model's forward passes; `default` leaves torch as found.
    `format` is `raw` (the prompt as it stands), `chat` (inside the model's own chat template) or
    `auto` (chat for an instruct model, raw for a base model); `system` is the chat's system
    message. `task` names the task template that a prompt's text goes into; the default,
    `completion`, adds nothing.
    `diagnostics` asks for the checks that need the model again after the table is made: `standard`
    or `full`; they become sections of the summary. `text` is the held-out text that some of them
    read: a plain file, JSON lines, Parquet, or what else a `TextSource` takes.
    Batch and tile sizes do not change a result beyond rounding, but they are part of the
    configuration because the same bytes are promised only for the same configuration.
    """

    lenses: tuple[str, ...] = LENSES
    artifacts: Mapping[str, str | Path] = field(default_factory=dict[str, str | Path])
    norm_choice: Literal["final", "next_norm"] = "final"
    format: Literal["auto", "raw", "chat"] = "auto"
    system: str | None = None
    task: str = "completion"
    top_k: int = 20
    measures: MeasureConfig = field(default_factory=MeasureConfig)
    diagnostics: Literal["none", "standard", "full"] = "none"
    text: str | None = None
    products: Literal["default", "checked"] = "checked"
    run_products: Literal["default", "checked"] = "default"
    passes_per_batch: int = 32
    batch_bytes: int = 512 * MIB  # residuals of all layers and positions of one batch
    readout_bytes: int = 256 * MIB  # tiles of the readout

    def __post_init__(self) -> None:
        self._check_lenses()
        if self.norm_choice not in ("final", "next_norm"):
            raise ConfigError(
                f"unknown norm choice {self.norm_choice!r}"
                f"{nearest(self.norm_choice, ('final', 'next_norm'))}; use final or next_norm"
            )
        if self.diagnostics not in DIAGNOSTICS:
            raise ConfigError(
                f"unknown diagnostics {self.diagnostics!r}"
                f"{nearest(self.diagnostics, DIAGNOSTICS)}; use none, standard or full"
            )
        if self.text is not None and self.diagnostics == "none":
            raise ConfigError("text is what diagnostics read; ask for standard or full ones")
        if self.format not in PROMPT_FORMATS:
            raise ConfigError(
                f"unknown format {self.format!r}{nearest(self.format, PROMPT_FORMATS)}; "
                "use auto, raw or chat"
            )
        if self.system is not None and self.format == "raw":
            raise ConfigError("system belongs to a chat; use format chat, or drop it")
        if self.top_k < 5:  # p_top5 sums the five most likely
            raise ConfigError(f"top_k must be at least 5, not {self.top_k}")
        for name in ("passes_per_batch", "batch_bytes", "readout_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def _check_lenses(self) -> None:
        for name in self.lenses:
            if name not in CHOICES:
                raise ConfigError(
                    f"unknown lens {name!r}{nearest(name, CHOICES)}; known: {', '.join(CHOICES)}"
                )
        if not self.lenses or len(set(self.lenses)) < len(self.lenses):
            raise ConfigError("give each lens once, and at least one: raw, norm")
        for name in self.artifacts:
            if name not in FITTED_NAMES:
                raise ConfigError(
                    f"artifacts names {name!r}{nearest(name, FITTED_NAMES)}; folders belong to "
                    f"{', '.join(FITTED_NAMES)}"
                )
            if name != "temperature" and name not in self.lenses and AUTO not in self.lenses:
                raise ConfigError(
                    f"artifacts gives a folder for {name!r}, which is no lens of this run; add it "
                    "to lenses, or leave its folder out"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON-able values."""
        artifacts = {name: str(path) for name, path in self.artifacts.items()}
        return asdict(self) | {"artifacts": artifacts}

    def content(self) -> dict[str, Any]:
        """Return what decides the bytes of a table: all but where fitted lenses lie, and checks."""
        other = ("artifacts", "diagnostics", "text")
        return {name: value for name, value in self.to_dict().items() if name not in other}
