"""What a sweep measures: numbers of the last logits, of which only the wanted are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, nearest
from layerscope.models import LanguageModel
from layerscope.products import Products
from layerscope.products import products as matrix_products
from layerscope.readout.unembedding import Unembedding

# Logits held at once where a metric needs the whole vocabulary, in bytes.
_LOGITS_BYTES = 64 * 2**20

Custom = Callable[[Float[Tensor, "cell token"]], Float[Tensor, " cell"]]


@dataclass(frozen=True)
class Targets:
    """The token ids that a metric is about.

    Attributes:
        answers: first tokens of right answers.
        foils: first tokens of wrong answers; may be empty for metrics that need none.
    """

    answers: tuple[int, ...]
    foils: tuple[int, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A number of a row of logits.

    Attributes:
        name: as tables have it.
        unit: "logits", "nats", "bits", ...
        whole: needs the whole vocabulary.
        custom: of the logits of `ids`, for a metric of one's own.
    """

    name: str
    unit: str
    whole: bool
    custom: Custom | None = None
    ids: tuple[int, ...] = ()
    foils: bool = field(default=False)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "logits", whole=False, foils=True),
        Metric("logit", "logits", whole=False),
        Metric("prob", "", whole=True),
        Metric("prob_diff", "", whole=True, foils=True),
        Metric("logprob", "nats", whole=True),
        Metric("kl", "bits", whole=True),
        Metric("rank", "", whole=True),
    )
}
"""Of the answers' tokens A and the foils' F, with softmax probabilities p.

logit_diff: mean logit of A less that of F. logit: mean logit of A. prob: p(A). prob_diff:
p(A) - p(F). logprob: ln p(A). kl: KL(reference || cell), the reference being the clean run. rank:
1 + how many logits are strictly larger than the best of A's.
"""


def metric_of(name: str | Metric) -> Metric:
    """Return a metric by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise ConfigError(
            f"unknown metric '{name}'{nearest(name, METRICS)}; available: {', '.join(METRICS)}"
        )
    return METRICS[name]


def custom_metric(name: str, ids: Sequence[int], function: Custom, *, unit: str = "") -> Metric:
    """Return a metric of one's own: a function of the logits of some tokens, and only of them.

    Args:
        ids: tokens whose logits are made.
        function: [cell, token] logits in the order of `ids` -> [cell].
    """
    if not ids:
        raise ConfigError(f"the metric '{name}' needs the ids of the tokens whose logits it reads")
    return Metric(name, unit, whole=False, custom=function, ids=tuple(ids))


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads metrics off what is unembedded.

    Attributes:
        targets: one per row of the recording.
        reference: what the clean run unembeds, by row; for `kl`.
    """

    model: LanguageModel
    metrics: tuple[Metric, ...]
    targets: tuple[Targets, ...]
    reference: Float[Tensor, "row d_model"] | None = None
    products: Products = "default"

    def __post_init__(self) -> None:
        for metric in self.metrics:
            for targets in self.targets:
                if metric.custom is None and metric.name != "kl" and not targets.answers:
                    raise ConfigError(f"the metric '{metric.name}' needs an answer for every pair")
                if metric.foils and not targets.foils:
                    raise ConfigError(
                        f"the metric '{metric.name}' needs a foil for every pair: give `foil`, or "
                        "measure prob, logprob or rank"
                    )
            if metric.name == "kl" and self.reference is None:
                raise ConfigError("the metric 'kl' needs the clean run as its reference")

    def __call__(
        self, final: Float[Tensor, "cell d_model"], rows: Sequence[int]
    ) -> Float[Tensor, "cell metric"]:
        """Return every metric of every cell, in float64."""
        results = torch.empty(len(rows), len(self.metrics), dtype=torch.float64)
        head = self.model.unembedding
        places = list(rows)
        whole = any(metric.whole for metric in self.metrics)
        step = max(_LOGITS_BYTES // (8 * head.d_vocab), 1) if whole else len(places)
        with torch.no_grad(), matrix_products(self.products, device=head.weight.device):
            for begin in range(0, len(places), step):
                chosen = slice(begin, begin + step)
                results[chosen] = self._read(final[chosen], places[chosen], head, whole)
        return results

    def _read(
        self, final: Tensor, rows: list[int], head: Unembedding, whole: bool
    ) -> Float[Tensor, "cell metric"]:
        table = _logits(head, final, None) if whole else None
        columns: list[Tensor] = []
        for metric in self.metrics:
            if metric.custom is not None:
                logits = self._some(head, final, table, metric.ids)
                columns.append(metric.custom(logits).double().cpu().reshape(len(rows)))
                continue
            column = torch.empty(len(rows), dtype=torch.float64)
            for row in dict.fromkeys(rows):
                at = torch.tensor([place for place, own in enumerate(rows) if own == row])
                column[at] = self._metric(metric, final, table, at, row, head).double().cpu()
            columns.append(column)
        return torch.stack(columns, dim=1)

    def _metric(
        self,
        metric: Metric,
        final: Tensor,
        table: Tensor | None,
        at: Tensor,
        row: int,
        head: Unembedding,
    ) -> Float[Tensor, " cell"]:
        targets = self.targets[row]
        at = at.to(final.device)
        if not metric.whole:
            own = None if table is None else table[at]
            answers = self._some(head, final[at], own, targets.answers).double().mean(dim=1)
            if metric.name == "logit":
                return answers
            return answers - self._some(head, final[at], own, targets.foils).double().mean(dim=1)
        assert table is not None
        logits = table[at].double()
        if metric.name == "rank":
            best = logits[:, list(targets.answers)].amax(dim=1, keepdim=True)
            return 1 + (logits > best).sum(dim=1)
        logprobs = logits.log_softmax(dim=-1)
        if metric.name == "kl":
            assert self.reference is not None
            clean = _logits(head, self.reference[row : row + 1], None).double().log_softmax(-1)
            return (clean.exp() * (clean - logprobs)).sum(dim=-1) / math.log(2)
        total = logprobs[:, list(targets.answers)].logsumexp(dim=1)
        if metric.name == "logprob":
            return total
        if metric.name == "prob_diff":
            return total.exp() - logprobs[:, list(targets.foils)].logsumexp(dim=1).exp()
        return total.exp()

    @staticmethod
    def _some(
        head: Unembedding, final: Tensor, table: Tensor | None, ids: Sequence[int]
    ) -> Float[Tensor, "cell token"]:
        return _logits(head, final, ids) if table is None else table[:, list(ids)]


def _logits(
    head: Unembedding, final: Float[Tensor, "cell d_model"], ids: Sequence[int] | None
) -> Float[Tensor, "cell token"]:
    """Return logits of some tokens, or all, with every transform of the head."""
    dtype = torch.promote_types(final.dtype, torch.float32)
    weight = head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    if ids is not None:
        index = torch.tensor(list(ids), device=weight.device)
        weight = weight[index]
        bias = None if bias is None else bias[index]
    z = final.detach().to(weight.device, dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if head.scale != 1.0:
        z = z * head.scale
    return head.cap(z)


def recovery(
    value: Float[Tensor, "*cell"], base: float, donor: float
) -> Float[Tensor, "*cell"] | None:
    """Return ``(value - base) / (donor - base)``: 0 as without the patch, 1 as the donor.

    None where base and donor give the same number, so that nothing can be recovered.
    """
    gap = donor - base
    scale = max(abs(donor), abs(base), 1.0)
    if not math.isfinite(gap) or abs(gap) <= 1e-9 * scale:
        return None
    return (value - base) / gap
