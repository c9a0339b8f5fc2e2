"""A logit, or a logit difference, as a sum over what writes into the residual stream.

The final norm is held at the scale that it has in this run, which makes the logit linear in the
stream: every part's share is what it wrote times the direction that the answer reads. Biases and a
softcap are parts of their own, and what is left is printed (rounding, where all is well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.stream import FrozenNorm, block_writings, freeze_norm, sites_of
from layerscope.models import Capture, LanguageModel, RunResult, Site, TokenBatch
from layerscope.models.prompts import PromptsLike


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """The parts of one logit (difference) per prompt.

    Attributes:
        parts: name to [row], in logits; in the order of the pass, then ``norm_bias``,
            ``unembed_bias`` and ``softcap`` (what the cap takes away).
        logit: [row], what the model's head gave.
        remainder: [row], the logit less all parts.
        direction: [row, d_model], what reads the residual stream, the norm's scale included.
    """

    parts: Mapping[str, Float[Tensor, " row"]]
    logit: Float[Tensor, " row"]
    direction: Float[Tensor, "row d_model"]

    @property
    def remainder(self) -> Float[Tensor, " row"]:
        """What no part accounts for."""
        return self.logit - torch.stack(list(self.parts.values())).sum(0)

    @property
    def relative_remainder(self) -> float:
        """The largest remainder, relative to the sum of the sizes of all parts of its row."""
        sizes = torch.stack(list(self.parts.values())).abs().sum(0) + self.logit.abs()
        return float((self.remainder.abs() / sizes.clamp_min(1e-300)).max())

    def table(self) -> pl.DataFrame:
        """Return one row per prompt and part: ``row, part, layer, value``."""
        rows = [
            {"row": row, "part": name, "layer": _layer_of(name), "value": float(values[row])}
            for row in range(len(self.logit))
            for name, values in [*self.parts.items(), ("remainder", self.remainder)]
        ]
        schema = {"row": pl.Int64, "part": pl.String, "layer": pl.Int64, "value": pl.Float64}
        return pl.DataFrame(rows, schema=schema)


def direct_logit_attribution(
    model: LanguageModel,
    prompts: PromptsLike,
    answers: Int[Tensor, " row"] | Sequence[int],
    foils: Int[Tensor, " row"] | Sequence[int] | None = None,
    *,
    position: int = -1,
    heads: bool = True,
) -> DirectAttribution:
    """Split the logit of an answer (less that of a foil) over the parts that wrote it.

    Args:
        model: the model.
        prompts: one or several.
        answers: an id per prompt.
        foils: an id per prompt, or None for the answer's logit alone.
        position: the position whose next token is asked for.
        heads: split attention into heads and bias.

    Raises:
        ConfigError: not one answer (and foil) per prompt, or an id outside the vocabulary.
        CapabilityError: the final norm, or one behind attention, cannot be held fixed.
    """
    batch = model.tokenize(prompts)
    reading = read_logits(model, batch, answers, foils, position=position, heads=heads)
    parts: dict[str, Tensor] = {"embed": reading.share(reading.result[Site("resid_pre", 0)])}
    for layer in range(model.n_layers):
        written = block_writings(model, layer, reading.result.activations, heads=heads)
        parts |= {str(writer): reading.share(value) for writer, value in written.items()}
    return DirectAttribution(parts | reading.constants, reading.logit, reading.direction)


@dataclass(frozen=True, eq=False)
class Reading:
    """How the answer is read from the stream at one position of each prompt.

    Attributes:
        result: the run, captured at that position.
        direction: [row, d_model] in the stream. logit: [row].
        constants: what does not come from the stream: biases and the cap.
    """

    result: RunResult
    direction: Float[Tensor, "row d_model"]
    logit: Float[Tensor, " row"]
    constants: dict[str, Float[Tensor, " row"]]

    def share(self, written: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """Return what something written at the position adds to the logit."""
        return (written[:, 0].detach().cpu().double() * self.direction).sum(-1)


def read_logits(
    model: LanguageModel,
    batch: TokenBatch,
    answers: Int[Tensor, " row"] | Sequence[int],
    foils: Int[Tensor, " row"] | Sequence[int] | None,
    *,
    position: int = -1,
    heads: bool = True,
) -> Reading:
    """Run once, and find the direction in the stream that the answer's logit reads."""
    target = _ids(model, answers, len(batch), "answers")
    foil = None if foils is None else _ids(model, foils, len(batch), "foils")
    last = Site("resid_post", model.n_layers - 1)
    ends = [Site("resid_pre", 0), last, Site("final_norm")]
    blocks = [s for layer in range(model.n_layers) for s in sites_of(model, layer, heads=heads)]
    sites = list(dict.fromkeys([*ends, *blocks]))
    where = [[position]] * len(batch)
    result = model.run(batch, capture=Capture(sites, positions=where), logits=where)
    name, norm = model.norm_at(model.n_layers, "final")
    frozen = freeze_norm(
        norm, result[last][:, 0], result[Site("final_norm")][:, 0], model.dtype, name
    )
    assert result.logits is not None
    logits = result.logits[:, 0].detach().cpu().double()
    head = model.unembedding
    weight = _rows(head.weight, target) - (0.0 if foil is None else _rows(head.weight, foil))
    chosen = _difference(logits, target, foil)
    constants = _constants(model, frozen, weight, result, target, foil, chosen)
    return Reading(result, frozen.pull(weight * head.scale), chosen, constants)


def _constants(
    model: LanguageModel,
    frozen: FrozenNorm,
    weight: Float[Tensor, "row d_model"],
    result: RunResult,
    target: Int[Tensor, " row"],
    foil: Int[Tensor, " row"] | None,
    chosen: Float[Tensor, " row"],
) -> dict[str, Float[Tensor, " row"]]:
    head = model.unembedding
    found: dict[str, Tensor] = {}
    if bool((frozen.bias != 0).any()):
        found["norm_bias"] = (weight @ frozen.bias) * head.scale
    if head.bias is not None:
        bias = head.bias.detach().cpu().double()
        found["unembed_bias"] = (bias[target] - (0.0 if foil is None else bias[foil])) * head.scale
    if head.softcap is not None:
        normed = result[Site("final_norm")][:, 0].detach().cpu().double()
        bare = (normed * weight).sum(-1) * head.scale + found.get("unembed_bias", 0.0)
        found["softcap"] = chosen - bare
    return found


def _difference(
    logits: Float[Tensor, "row vocab"],
    target: Int[Tensor, " row"],
    foil: Int[Tensor, " row"] | None,
) -> Float[Tensor, " row"]:
    answer = logits.gather(1, target[:, None])[:, 0]
    return answer if foil is None else answer - logits.gather(1, foil[:, None])[:, 0]


def _rows(weight: Tensor, ids: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
    return weight.detach()[ids.to(weight.device)].cpu().double()


def _ids(
    model: LanguageModel, given: Tensor | Sequence[int], n_rows: int, what: str
) -> Int[Tensor, " row"]:
    ids = torch.as_tensor(given, dtype=torch.long).cpu().reshape(-1)
    if len(ids) != n_rows:
        raise ConfigError(f"there are {len(ids)} {what} for {n_rows} prompts; give one each")
    if not bool(((ids >= 0) & (ids < model.d_vocab)).all()):
        raise ConfigError(f"{what} hold an id outside the vocabulary of {model.d_vocab}")
    return ids


def _layer_of(part: str) -> int | None:
    pieces = part.split(".")
    return int(pieces[1]) if len(pieces) > 1 else None
