"""What a function-vector run is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from layerscope.errors import ConfigError, nearest
from layerscope.interventions.function_vectors.tasks import Layout

Corruption = Literal["auto", "shuffled", "zero_shot"]


@dataclass(frozen=True, kw_only=True)
class FunctionVectorConfig:
    """Settings of a run.

    Attributes:
        shots: examples before a query.
        means: prompts over which head outputs are averaged (those that the model answers).
        prompts: prompts in which indirect effects are measured.
        trials: test queries; validation has as many as the split gives, at most this number.
        heads: sizes of the head set to try; the validation split chooses among them.
        random_sets: sets of as many heads from outside the chosen ones, as control.
        corruption: prompts that do not show the task. "shuffled" permutes the examples' answers
            (Todd et al. 2024); "zero_shot" has no examples. "auto" takes shuffled, unless the
            model answers those nearly as well, which happens where answers alone give a task away.
        validation, test: shares of the pairs for choosing and for testing.
        layout: how prompts are written.
        texts: sentences with {input} that end where the answer begins; the chosen vector is also
            tried in these, where nothing looks like the prompts that it was found in.
        transfer_band: least and largest zero-shot accuracy without the vector that allow a claim of
            transfer: where queries are answered without examples anyway, or hardly ever can be,
            what the vector adds says nothing about the task.
        coefficient: what the vector is multiplied by.
        seed: of every draw.
    """

    shots: int = 8
    means: int = 64
    prompts: int = 25
    trials: int = 50
    heads: tuple[int, ...] = (1, 2, 5, 10, 20)
    random_sets: int = 5
    corruption: Corruption = "auto"
    validation: float = 0.2
    test: float = 0.3
    layout: Layout = field(default_factory=Layout)
    texts: tuple[str, ...] = ()
    transfer_band: tuple[float, float] = (0.0, 0.5)
    coefficient: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shots", "means", "prompts", "trials", "random_sets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.heads or min(self.heads) < 1:
            raise ConfigError("heads needs sizes of 1 or more, such as (1, 5, 10)")
        if self.corruption not in get_args(Corruption):
            raise ConfigError(
                f"unknown corruption '{self.corruption}'"
                f"{nearest(self.corruption, get_args(Corruption))}; use auto, shuffled or zero_shot"
            )
        for text in self.texts:
            if text.count("{input}") != 1:
                raise ConfigError(f"the text {text!r} needs {{input}} once, where the query stands")
        low, high = self.transfer_band
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"transfer_band is two accuracies such as (0, 0.5), got {low}, {high}"
            )
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.validation + self.test >= 1:
            raise ConfigError("validation and test leave no pairs for training; use smaller shares")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("heads", "texts", "transfer_band")}
        return {**asdict(self), **lists}
