"""From prompt pairs to a contrast: padded rows, and a metric of their answers and foils."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, PromptError, nearest
from layerscope.interventions.attribution.contrast import Contrast, Direction
from layerscope.interventions.patching.metrics import Targets
from layerscope.interventions.patching.pairs import TokenPair
from layerscope.models import LanguageModel, TokenBatch

MetricName: TypeAlias = Literal["logit_diff", "logit", "logprob", "prob"]
METRICS: tuple[MetricName, ...] = ("logit_diff", "logit", "logprob", "prob")


@dataclass(frozen=True, eq=False)
class TargetMetric:
    """A differentiable metric of every row's own answers and foils; see `patching.METRICS`."""

    name: MetricName
    targets: tuple[Targets, ...]

    def __post_init__(self) -> None:
        if self.name not in METRICS:
            raise ConfigError(
                f"unknown metric '{self.name}'{nearest(self.name, METRICS)}; gradients are taken "
                f"of {', '.join(METRICS)}"
            )
        for targets in self.targets:
            if not targets.answers or (self.name == "logit_diff" and not targets.foils):
                raise ConfigError(
                    f"the metric '{self.name}' needs an answer"
                    f"{' and a foil' if self.name == 'logit_diff' else ''} for every pair; add "
                    "them, or use logprob where there is no foil"
                )

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Return one number per row."""
        rows = zip(logits, self.targets, strict=True)
        return torch.stack([self._of(row, targets) for row, targets in rows])

    def _of(self, row: Float[Tensor, " vocab"], targets: Targets) -> Float[Tensor, ""]:
        answers = row[list(targets.answers)]
        if self.name == "logit_diff":
            return answers.mean() - row[list(targets.foils)].mean()
        if self.name == "logit":
            return answers.mean()
        total = answers.logsumexp(0) - row.logsumexp(0)
        return total if self.name == "logprob" else total.exp()


def contrast_of(
    model: LanguageModel,
    pairs: Sequence[TokenPair],
    *,
    metric: MetricName = "logit_diff",
    direction: Direction = "noise",
) -> Contrast:
    """Return the contrast of some pairs, one padded row each.

    Raises:
        PromptError: a pair's prompts differ in their number of tokens.
        ConfigError: the metric needs an answer or a foil that a pair does not have.
    """
    for pair in pairs:
        if not pair.aligned:
            raise PromptError(
                f"pair '{pair.pair.key}' has {len(pair.clean)} clean and {len(pair.corrupt)} "
                f"corrupt tokens, {list(pair.clean)} and {list(pair.corrupt)}; gradients compare "
                "place by place, so reword one to the other's length"
            )
    clean = TokenBatch.from_ids([pair.clean for pair in pairs])
    corrupt = TokenBatch.from_ids([pair.corrupt for pair in pairs])
    measure = TargetMetric(metric, tuple(pair.targets for pair in pairs))
    return Contrast.of(model, clean, corrupt, measure, direction=direction)
