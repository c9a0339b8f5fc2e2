"""Fit a lens: text in, a checked artifact with its held-out figures out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from layerscope.allocator import peak_memory_bytes
from layerscope.errors import ConfigError, nearest
from layerscope.lenses.artifacts import model_facts, save_lens
from layerscope.lenses.base import Lens, NormChoice, check_norm_choice
from layerscope.lenses.fitted import (
    BiasLens,
    FittedLens,
    JacobianLens,
    PrismLens,
    TemperatureLens,
    TunedLens,
)
from layerscope.lenses.fitting.corpus import Corpus, DataConfig, read_corpus
from layerscope.lenses.fitting.drive import Progress, drive, forget
from layerscope.lenses.fitting.evaluate import depth_rows, judge, kl_bits
from layerscope.lenses.fitting.jacobian import JacobianOptions, JacobianSteps
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.prism import PrismOptions, PrismSteps
from layerscope.lenses.fitting.states import States, collect
from layerscope.lenses.fitting.temperature import fit_temperatures, normalised
from layerscope.lenses.fitting.text import TextSource
from layerscope.lenses.fitting.tuned import TunedSteps
from layerscope.lenses.norm import NormLens
from layerscope.lenses.raw import RawLens
from layerscope.models.language_model import LanguageModel

Kind = Literal["prism", "tuned", "temperature", "jacobian"]
KINDS: tuple[str, ...] = get_args(Kind)
Options: TypeAlias = PrismOptions | TunedOptions | JacobianOptions
_OPTIONS: dict[str, type[Options] | None] = {
    "prism": PrismOptions,
    "tuned": TunedOptions,
    "temperature": None,
    "jacobian": JacobianOptions,
}
_BASELINES = {"tuned": ("norm", "temperature", "bias")}


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted lens and what is known of it.

    Attributes:
        lens: ready to use.
        folder: where it is stored; None if it was not.
        kl_bits: KL(model || lens) on held-out text, in bits, by lens and row index; the lens itself
            beside raw, norm and its other baselines.
        verdict: whether it beats its baselines at 25, 50 and 75% depth (see `judge`).
        warnings: what a reader has to know, one line each; empty when all is well.
        details: everything that is stored in the artifact's JSON.
        resumed: steps that an earlier, interrupted process had done.
    """

    lens: FittedLens
    folder: Path | None
    kl_bits: dict[str, list[float]]
    verdict: dict[str, Any]
    warnings: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    resumed: int = 0


@dataclass(frozen=True, eq=False)
class _Fitted:
    lens: FittedLens
    others: dict[str, FittedLens]
    warnings: list[str]
    facts: dict[str, Any]
    resumed: int = 0


def fit_lens(
    kind: Kind,
    model: LanguageModel,
    source: TextSource | str | Path,
    folder: str | Path | None = None,
    *,
    data: DataConfig | None = None,
    options: Options | None = None,
    norm: NormChoice = "final",
    progress: Callable[[Progress], object] | None = None,
    checkpoint_seconds: float = 20.0,
) -> FitResult:
    """Fit a lens on text, measure it on held-out text, and store it.

    A fit that was interrupted goes on from the checkpoint in `folder`, and ends with the same
    tensors as one that was not.

    Args:
        kind: "prism", "tuned", "temperature" or "jacobian".
        model: the model; it is not changed.
        source: a text file, JSON lines, Parquet, or a Hugging Face dataset.
        folder: where the artifact goes; None stores nothing.
        data: how much text is read, and how it is sampled.
        options: `PrismOptions`, `TunedOptions` or `JacobianOptions`; None for the defaults.
        norm: which norm the lens uses ("final" for the Jacobian lens).
        progress: called after every step.
        checkpoint_seconds: least time between checkpoints.

    Raises:
        ConfigError: the text is too short or unreadable, or an option does not fit.
        LensError: states are not finite, or the folder holds the checkpoint of another fit.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown lens '{kind}'{nearest(kind, KINDS)}; fit {', '.join(KINDS)}")
    check_norm_choice(norm)
    wanted = _OPTIONS[kind]
    if options is None and wanted is not None:
        options = wanted()
    if options is not None and (wanted is None or not isinstance(options, wanted)):
        takes = "no options" if wanted is None else wanted.__name__
        raise ConfigError(f"a {kind} lens takes {takes}, not {type(options).__name__}")
    data = data or DataConfig()
    started = time.monotonic()
    if not isinstance(source, TextSource):
        source = TextSource(str(source))
    corpus = read_corpus(source, model, data)
    place = None if folder is None else Path(folder)
    settings = {
        "kind": kind,
        "norm": norm,
        "data": asdict(data),
        "options": None if options is None else asdict(options),
    }
    key = {**settings, "ids_sha256": corpus.sha256, "model": model_facts(model)}
    job = _Job(model, corpus, data, norm, place, key, progress, checkpoint_seconds)
    fitted = job.fit(kind, options)
    table, rows = job.table(fitted)
    verdict = judge(kind, table, _BASELINES.get(kind, ("norm",)), model.n_layers)
    warnings = (*fitted.warnings, *verdict["failures"])
    details = {
        **settings,
        "corpus": corpus.description,
        "held_out": {"positions": rows, "kl_bits": table, "depths": depth_rows(model.n_layers)},
        "verdict": verdict,
        "warnings": list(warnings),
        **fitted.facts,
        "versions": model.provenance()["versions"],
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if place is not None:
        save_lens(fitted.lens, place, model, others=fitted.others, details=details)
        forget(place)
    return FitResult(fitted.lens, place, table, verdict, warnings, details, resumed=fitted.resumed)


@dataclass(frozen=True, eq=False)
class _Job:
    model: LanguageModel
    corpus: Corpus
    data: DataConfig
    norm: NormChoice
    folder: Path | None
    key: dict[str, Any]
    progress: Callable[[Progress], object] | None
    checkpoint_seconds: float

    def fit(self, kind: Kind, options: Options | None) -> _Fitted:
        if isinstance(options, PrismOptions):
            return self._prism(options)
        if isinstance(options, TunedOptions):
            return self._tuned(options)
        if isinstance(options, JacobianOptions):
            return self._jacobian(options)
        # One number a row index: as many sequences as are validated on are plenty.
        ids = self.corpus.train[: len(self.corpus.validation)]
        lens, warnings = self._temperature(collect(self.model, ids, self.data))
        return _Fitted(lens, {}, warnings, {})

    def table(self, fitted: _Fitted) -> tuple[dict[str, list[float]], int]:
        """Return held-out KL of the lens and its baselines, and on how many positions."""
        states = collect(self.model, self.corpus.held_out, self.data)
        lenses: dict[str, Lens] = {
            "raw": RawLens(self.model),
            "norm": NormLens(self.model, choice=self.norm),
        }
        if fitted.lens.kind != "temperature" and "temperature" not in fitted.others:
            validation = collect(self.model, self.corpus.validation, self.data)
            lenses["temperature"] = self._temperature(validation)[0]
        lenses |= cast("dict[str, Lens]", {**fitted.others, fitted.lens.kind: fitted.lens})
        table = {name: kl_bits(self.model, lens, states) for name, lens in lenses.items()}
        return table, states.head.shape[0]

    def _drive(self, steps: Any) -> int:
        return drive(
            steps,
            folder=self.folder,
            key=self.key,
            every=self.checkpoint_seconds,
            progress=self.progress,
        )

    def _temperature(self, states: States) -> tuple[TemperatureLens, list[str]]:
        hidden = normalised(self.model, states, self.norm)
        found = fit_temperatures(hidden, states.head, self.model.unembedding)
        warnings = [
            f"row {row} carries nothing that a temperature could use: the best one is infinite"
            for row, inverse in enumerate(found.inverse_temperature.tolist())
            if inverse == 0.0
        ]
        warnings += [
            f"the temperature of row {row} has no finite minimum"
            for row, settled in enumerate(found.settled)
            if not settled
        ]
        tensors = {"inverse_temperature": found.inverse_temperature.cpu()}
        return TemperatureLens(self.model, tensors, norm=self.norm), warnings

    def _prism(self, options: PrismOptions) -> _Fitted:
        steps = PrismSteps(self.model, self.corpus, self.data, options, self.norm)
        resumed = self._drive(steps)
        if options.rank != "auto":
            lens = PrismLens(self.model, steps.tensors(options), norm=self.norm)
            return _Fitted(lens, {}, [], {"rank": options.rank or self.model.d_model}, resumed)
        validation = collect(self.model, self.corpus.validation, self.data)
        at = depth_rows(self.model.n_layers).values()
        tried: dict[int, float] = {}
        lenses: dict[int, PrismLens] = {}
        rank = self.model.d_model
        while rank >= 4:
            tensors = steps.tensors(replace(options, rank=rank))
            lenses[rank] = PrismLens(self.model, tensors, norm=self.norm)
            bits = kl_bits(self.model, lenses[rank], validation)
            tried[rank] = sum(bits[row] for row in at) / len(at)
            rank //= 2
        best = min(tried, key=tried.__getitem__)
        facts = {"rank": best, "validation_bits_by_rank": tried}
        return _Fitted(lenses[best], {}, [], facts, resumed)

    def _tuned(self, options: TunedOptions) -> _Fitted:
        steps = TunedSteps(self.model, self.corpus, self.data, options, self.norm)
        resumed = self._drive(steps)
        found = steps.tensors()
        others: dict[str, FittedLens] = {}
        if "bias" in found:
            others["bias"] = BiasLens(self.model, found["bias"], norm=self.norm)
        others["temperature"], _ = self._temperature(steps.validation())
        warnings = [] if steps.stopped is None else [steps.stopped]
        facts = {"history": steps.history, "stopped": steps.stopped}
        lens = TunedLens(self.model, found["tuned"], norm=self.norm)
        return _Fitted(lens, others, warnings, facts, resumed)

    def _jacobian(self, options: JacobianOptions) -> _Fitted:
        steps = JacobianSteps(self.model, self.corpus, self.data, options)
        resumed = self._drive(steps)
        lens = JacobianLens(self.model, steps.tensors(), norm=self.norm)
        return _Fitted(lens, {}, [], {}, resumed)
