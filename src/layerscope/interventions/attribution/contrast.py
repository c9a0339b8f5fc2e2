"""What every attribution method is asked: two runs, the one that is changed and the other's values.

``noise`` puts corrupt values into the clean run, ``denoise`` clean values into the corrupt run.
An effect is always the metric after the change less the metric of the run that is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import AlignmentError, ConfigError
from layerscope.models import Edit, LanguageModel, Replace, RunResult, Site, TokenBatch
from layerscope.models.prompts import PromptsLike

Direction: TypeAlias = Literal["noise", "denoise"]
Metric: TypeAlias = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, " row"]]
"""A differentiable function of the last position's logits, one number per prompt."""

FIRST = Site("resid_pre", 0)


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The answer's logit less the foil's; without foils, less the mean of all other logits."""

    answers: Int[Tensor, " row"]
    foils: Int[Tensor, " row"] | None = None

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Return one difference per row, in logits."""
        answer = logits.gather(-1, self.answers.to(logits.device)[:, None])[:, 0]
        if self.foils is not None:
            return answer - logits.gather(-1, self.foils.to(logits.device)[:, None])[:, 0]
        return answer - (logits.sum(-1) - answer) / (logits.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class AnswerProbability:
    """The answer's probability, or its log-probability in nats."""

    answers: Int[Tensor, " row"]
    log: bool = False

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Return one (log-)probability per row."""
        chosen = logits.log_softmax(-1).gather(-1, self.answers.to(logits.device)[:, None])[:, 0]
        return chosen if self.log else chosen.exp()


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two runs over prompts that agree token for token in their places, and a metric.

    Attributes:
        base: the prompts whose run is changed.
        donor: the prompts whose values are put in.
        metric: of the last position's logits.
        direction: which of the two is the clean one.
    """

    model: LanguageModel
    base: TokenBatch
    donor: TokenBatch
    metric: Metric
    direction: Direction = "noise"

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        clean: PromptsLike,
        corrupt: PromptsLike,
        metric: Metric,
        *,
        direction: Direction = "noise",
    ) -> Contrast:
        """Pair clean and corrupt prompts row by row.

        Raises:
            AlignmentError: a pair differs in length; shows both tokenisations.
            ConfigError: the direction is unknown, or there are not as many clean as corrupt ones.
        """
        if direction not in ("noise", "denoise"):
            raise ConfigError(f"direction is {direction!r}; use 'noise' or 'denoise'")
        first, second = model.tokenize(clean), model.tokenize(corrupt)
        if len(first) != len(second):
            raise ConfigError(
                f"there are {len(first)} clean and {len(second)} corrupt prompts; give pairs"
            )
        for row, lengths in enumerate(zip(first.lengths, second.lengths, strict=True)):
            if lengths[0] != lengths[1]:
                raise AlignmentError(
                    f"pair {row} has {lengths[0]} clean and {lengths[1]} corrupt tokens, so places "
                    f"cannot be compared: {first.tokens(row, model.tokenizer)} and "
                    f"{second.tokens(row, model.tokenizer)}; reword one to the other's length"
                )
        base, donor = (first, second) if direction == "noise" else (second, first)
        return cls(model, base, donor, metric, direction)

    @property
    def reverse(self) -> Contrast:
        """The same pairs with the other run changed."""
        other: Direction = "denoise" if self.direction == "noise" else "noise"
        return Contrast(self.model, self.donor, self.base, self.metric, other)

    @property
    def n_rows(self) -> int:
        """Number of prompt pairs."""
        return len(self.base)

    @cached_property
    def ends(self) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The metric of the base and of the donor run."""
        return self.measure(self.base), self.measure(self.donor)

    @property
    def total(self) -> Float[Tensor, " row"]:
        """The whole effect: what changing everything does to the metric."""
        base, donor = self.ends
        return donor - base

    def measure(
        self, batch: TokenBatch, edits: Sequence[Edit] = (), **options: Any
    ) -> Float[Tensor, " row"]:
        """Run a batch and return its metric."""
        result = self.model.run(batch, edits=edits, logits="last", **options)
        return self.metric_of(result)

    def metric_of(self, result: RunResult) -> Float[Tensor, " row"]:
        """Return the metric of a run of the last logits, in at least float32."""
        assert result.logits is not None
        logits = result.logits[:, -1]
        return self.metric(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def values(self, which: Literal["base", "donor"], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Return the activations of one of the two runs."""
        batch = self.base if which == "base" else self.donor
        return dict(self.model.run(batch, capture=list(sites), logits=None).activations)

    def gradients(
        self,
        sites: Sequence[Site],
        *,
        start: Float[Tensor, "row pos d_model"] | None = None,
        edits: Sequence[Edit] = (),
    ) -> Gradients:
        """Return values at sites and the metric's gradients there, for the base prompts.

        Args:
            sites: where; a site that the metric does not depend on has gradient zero.
            start: what block 0 reads instead of the base run's own embedding.
            edits: further edits of the run.
        """
        if start is None:
            start = self.values("base", [FIRST])[FIRST]
        # A leaf of our own, so that models whose weights are frozen have gradients as well.
        leaf = start.detach().clone().requires_grad_(True)
        result = self.model.run(
            self.base,
            capture=[*dict.fromkeys(sites)],
            edits=[Replace(FIRST, leaf), *edits],
            logits="last",
            gradients=True,
        )
        metric = self.metric_of(result)
        values = {site: result[site] for site in sites}
        live = {site: value for site, value in values.items() if value.requires_grad}
        found = slopes(metric, list(live.values())) if metric.requires_grad else []
        known = {
            site: gradient
            for site, gradient in zip(live, found, strict=metric.requires_grad)
            if gradient is not None
        }
        gradients = {site: torch.zeros_like(value) for site, value in values.items()} | known
        kept = {site: value.detach() for site, value in values.items()}
        return Gradients(metric.detach(), kept, gradients)


@dataclass(frozen=True, eq=False)
class Gradients:
    """A run's metric [row], and by site its values and the metric's gradients there."""

    metric: Float[Tensor, " row"]
    values: dict[Site, Tensor]
    gradients: dict[Site, Tensor]


def slopes(
    metric: Float[Tensor, " row"], values: Sequence[Tensor], *, again: bool = False
) -> list[Tensor | None]:
    """Return the gradient of a metric at each value, None where it does not depend on it.

    `again` keeps the graph for further gradients.
    """
    if not values:
        return []
    with torch.enable_grad():
        return list(
            torch.autograd.grad(metric.sum(), values, retain_graph=again, allow_unused=True)
        )
