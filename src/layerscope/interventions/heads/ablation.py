"""Do the heads found do the copying? They are ablated, and as many random others beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.heads.sequences import Repeated, parts_of
from layerscope.models import (
    Edit,
    LanguageModel,
    MeanAblate,
    ResampleAblate,
    Site,
    Start,
    ZeroAblate,
)

Head: TypeAlias = tuple[int, int]
Kind: TypeAlias = Literal["zero", "mean", "resample"]
KINDS: tuple[Kind, ...] = ("zero", "mean", "resample")
_EDITS: dict[Kind, type[Edit]] = {
    "zero": ZeroAblate,
    "mean": MeanAblate,
    "resample": ResampleAblate,
}
ROWS = 32
"""Sequences of one pass; a mean is taken over those of a pass."""


@dataclass(frozen=True)
class Ablation:
    """What taking heads away does to copying, beside random heads.

    Copying is the mean log-probability, in nats, of the right token in the second half; `accuracy`
    the share of places where it is the likeliest.

    Attributes:
        heads: the heads that were ablated together.
        whole: (log-probability, accuracy) of the untouched model.
        without: the same without the heads.
        controls: the same without as many random other heads, one pair per draw.
    """

    heads: tuple[Head, ...]
    whole: tuple[float, float]
    without: tuple[float, float]
    controls: tuple[tuple[float, float], ...]

    @property
    def drop(self) -> float:
        """Fall of the log-probability, in nats."""
        return self.whole[0] - self.without[0]

    @property
    def control_drops(self) -> tuple[float, ...]:
        """The same for every random draw."""
        return tuple(self.whole[0] - control[0] for control in self.controls)

    @property
    def ratio(self) -> float | None:
        """The fall over the mean size of the random ones; None where these change nothing."""
        mean = sum(abs(drop) for drop in self.control_drops) / len(self.controls)
        return self.drop / mean if mean > 0 else None

    @property
    def worst_ratio(self) -> float | None:
        """The fall over that of the most harmful random draw; None where none harms."""
        worst = max(self.control_drops)
        return self.drop / worst if worst > 0 else None


def ablate_heads(
    model: LanguageModel,
    repeated: Repeated,
    heads: Sequence[Head],
    *,
    kind: Kind = "mean",
    n_controls: int = 10,
    seed: int = 0,
) -> Ablation:
    """Ablate heads together, and as many random other heads `n_controls` times.

    Args:
        model: the model.
        repeated: the sequences to copy.
        heads: (layer, head) pairs.
        kind: "mean" puts the head's mean over all tokens, "resample" its output in another
            sequence, "zero" zero.
        n_controls: random draws, without the heads themselves.
        seed: of the draws.

    Raises:
        ConfigError: no heads, or too few others to draw from.
    """
    chosen = tuple(dict.fromkeys(heads))
    others = [
        (layer, head)
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
        if (layer, head) not in chosen and model.backend.why_not(_site((layer, head))) is None
    ]
    if not chosen or n_controls < 1 or len(others) < len(chosen):
        raise ConfigError(
            f"{len(chosen)} heads cannot be compared with as many of {len(others)} others; name "
            "at least one head, and fewer than half of all"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [
        [others[i] for i in torch.randperm(len(others), generator=generator)[: len(chosen)]]
        for _ in range(n_controls)
    ]
    return Ablation(
        chosen,
        _copying(model, repeated, ()),
        _copying(model, repeated, _edits(chosen, kind)),
        tuple(_copying(model, repeated, _edits(draw, kind)) for draw in draws),
    )


def copying_logprob(
    model: LanguageModel,
    repeated: Repeated,
    edits: Sequence[Edit] = (),
    *,
    start: Start | None = None,
) -> tuple[Float[Tensor, "row place"], Float[Tensor, "row place"]]:
    """Return log-probability (nats) and correctness of every token that can be copied."""
    places = list(repeated.predicted)
    logits = model.run(repeated.batch, edits=edits, logits=places, start=start).logits
    assert logits is not None
    expected = repeated.batch.ids[:, repeated.second.start + 1 : repeated.second.stop]
    expected = expected.to(logits.device)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    right = wide.log_softmax(-1).gather(-1, expected[..., None])[..., 0]
    return right.double().cpu(), (wide.argmax(-1) == expected).double().cpu()


def _copying(
    model: LanguageModel, repeated: Repeated, edits: Sequence[Edit]
) -> tuple[float, float]:
    parts = [copying_logprob(model, part, edits) for part in parts_of(repeated, ROWS)]
    logprob, right = (torch.cat(found) for found in zip(*parts, strict=True))
    return float(logprob.mean()), float(right.mean())


def drops_alone(
    model: LanguageModel, repeated: Repeated, layer: int, *, kind: Kind = "mean"
) -> Float[Tensor, " head"]:
    """Return the fall of copying (nats per token) when each head of a block is ablated by itself.

    Passes begin at the block, from the residual that it reads.
    """
    drops = torch.zeros(model.n_heads, dtype=torch.float64)
    before = Site("resid_pre", layer)
    for part in parts_of(repeated, ROWS):
        residual = model.run(part.batch, capture=before, stop_after=layer, logits=None)[before]
        start = Start(layer, residual)
        whole, _ = copying_logprob(model, part, start=start)
        share = len(part.batch) / len(repeated.batch)
        for head in range(model.n_heads):
            without, _ = copying_logprob(model, part, _edits([(layer, head)], kind), start=start)
            drops[head] += share * float((whole - without).mean())
    return drops


def _edits(heads: Sequence[Head], kind: Kind) -> list[Edit]:
    if kind not in KINDS:
        raise ConfigError(f"ablation is {kind!r}; use {', '.join(KINDS)}")
    return [_EDITS[kind](_site(head)) for head in heads]


def _site(head: Head) -> Site:
    return Site("attn.z", head[0], head[1])
