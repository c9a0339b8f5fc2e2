"""Does a dictionary fit the activations it is used on? If not, what went wrong?

A dictionary that is read with a wrong convention, at a wrong layer or of another model still gives
numbers. On real activations it gives itself away: it explains little, or fires too much or too
little. What it does is compared with what it would do with one mistake undone, and a mistake whose
undoing helps a lot is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import JumpRelu
from layerscope.features.belonging import site_width
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.figures import Figures, collect, measure
from layerscope.features.matrices import Matrix
from layerscope.models.batches import TokenBatch
from layerscope.models.language_model import LanguageModel
from layerscope.models.sites import Site

WORST_FVU = 0.5  # beyond it an alarm is raised even where no cause is found
L0_FACTOR = 2.0  # how far L0 may be from the expected one
ROWS = 2048  # activations that the causes are tried on
_NEIGHBOURS = 2
_SCALES = tuple(2.0 ** (step / 2) for step in range(-16, 17) if step)
_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_in", "mlp_in")


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong, most likely.

    Attributes:
        code: "transposed_decoder", "decoder_norm_gate", "threshold_rule", "pre_bias", "scale",
            "site", "l0" or "unexplained".
        text: one line with the figures and the remedy.
        fvu: what FVU would be without the mistake; None where no cause was found.
    """

    code: str
    text: str
    fvu: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        figures: of the dictionary as it stands.
        alarms: the likeliest cause first; empty when all is well.
        convention: how the file was read.
    """

    figures: Figures
    alarms: tuple[Alarm, ...]
    convention: str

    @property
    def passed(self) -> bool:
        """Whether there is no alarm."""
        return not self.alarms

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "passed": self.passed,
            "figures": self.figures.to_dict(),
            "alarms": [{"code": a.code, "text": a.text, "fvu": a.fvu} for a in self.alarms],
            "convention": self.convention,
        }


@torch.no_grad()
def check(
    dictionary: SparseDictionary,
    activations: Mapping[Site, Tensor],
    *,
    expected_l0: float | None = None,
) -> CheckReport:
    """Judge a dictionary by raw activations.

    Args:
        dictionary: any; its matrices are read.
        activations: [row, width] of the sites it reads and writes, and of any others that it may
            have been meant for; the same tokens everywhere.
        expected_l0: features per token; None takes what the file says, if it does.

    Raises:
        DictionaryError: activations of a site it reads or writes are missing.
    """
    for site in (dictionary.reads, dictionary.writes[0]):
        if site not in activations:
            raise DictionaryError(f"to check this dictionary, give activations of {site}")
    if expected_l0 is None:
        known = dictionary.facts.get("expected_l0")
        expected_l0 = float(known) if isinstance(known, int | float) else None
    x, y = activations[dictionary.reads], activations[dictionary.writes[0]]
    figures = measure(dictionary, x, y)
    alarms = [*_causes(dictionary, activations, expected_l0)]
    alarms.sort(key=lambda alarm: 1.0 if alarm.fvu is None else alarm.fvu)
    if not alarms:
        alarms = _without_cause(dictionary, figures, expected_l0)
    return CheckReport(figures, tuple(alarms), dictionary.convention)


def check_on_model(
    dictionary: SparseDictionary,
    model: LanguageModel,
    batches: Sequence[TokenBatch],
    *,
    skip: int | None = None,
    expected_l0: float | None = None,
    other_model: bool = False,
) -> CheckReport:
    """Judge a dictionary by what a model computes on text, and try neighbouring sites.

    Args:
        dictionary: any.
        model: the model it is meant for.
        batches: padded ids of some hundred tokens or more.
        skip: first positions of every row that are left out; None takes what the file says, else 1.
        expected_l0: as in `check`.
        other_model: accept a model of another name.

    Raises:
        DictionaryError: widths, sites or the model's name do not fit.
    """
    dictionary.require_model(model, other_model=other_model)
    if skip is None:
        stored = dictionary.facts.get("skip")
        skip = int(stored) if isinstance(stored, int | float) else 1
    sites = [dictionary.reads, *dictionary.writes[:1]]
    sites += [site for site in _alternatives(dictionary, model) if site not in sites]
    found = collect(model, batches, list(dict.fromkeys(sites)), skip=skip)
    return check(dictionary, found, expected_l0=expected_l0)


def _alternatives(dictionary: SparseDictionary, model: LanguageModel) -> Iterator[Site]:
    """Yield sites of the same width nearby: other layers of the same kind, other kinds."""
    if not dictionary.is_autoencoder or dictionary.reads.layer is None:
        return
    own = dictionary.reads.layer
    available = set(model.sites())
    candidates = [
        Site(dictionary.reads.kind, layer)
        for layer in range(own - _NEIGHBOURS, own + _NEIGHBOURS + 1)
    ]
    candidates += [Site(kind, own) for kind in _STREAM]
    for site in candidates:
        if site in available and site_width(model, site) == dictionary.d_in:
            yield site


def _causes(
    dictionary: SparseDictionary, activations: Mapping[Site, Tensor], expected_l0: float | None
) -> Iterator[Alarm]:
    x = _some(activations[dictionary.reads])
    y = _some(activations[dictionary.writes[0]])
    base = measure(dictionary, x, y)
    for cause in _conventions(dictionary):
        try:
            other = measure(cause.dictionary, x, y)
        except DictionaryError:
            continue
        if _explains(base, other, cause.factor, expected_l0 if cause.by_l0 else None):
            yield Alarm(cause.code, _text(cause.words, base, other), other.fvu)
    yield from _scaled(dictionary, base, x, y)
    for site, values in activations.items():
        if site in (dictionary.reads, dictionary.writes[0]) or not dictionary.is_autoencoder:
            continue
        if values.shape[1] != dictionary.d_in:
            continue
        other = measure(dictionary, _some(values))
        if other.fvu < 0.7 * base.fvu and base.fvu - other.fvu > 0.01:
            words = f"it fits {site} better than {dictionary.reads}: the layer or hook is wrong"
            yield Alarm("site", _text(words, base, other), other.fvu)


@dataclass(frozen=True)
class _Cause:
    """A mistake, and the dictionary with it undone.

    Attributes:
        factor: by how much FVU must fall for it to be believed.
        by_l0: whether a better L0 alone is evidence as well.
    """

    code: str
    words: str
    dictionary: SparseDictionary
    factor: float = 0.5
    by_l0: bool = False


def _conventions(dictionary: SparseDictionary) -> Iterator[_Cause]:
    gate, decoder = dictionary.gate, dictionary.decoders[0]
    if len(dictionary.decoders) == 1 and decoder.shape[0] == decoder.shape[1]:
        turned = Matrix.of(decoder.name, decoder.tensor().T.contiguous())
        yield _Cause(
            "transposed_decoder",
            "W_dec seems transposed (it is square, so its shape does not tell)",
            dictionary.but(decoders=(turned,)),
        )
    if isinstance(gate, JumpRelu):
        norms = decoder.norms().to(gate.thresholds.device, gate.thresholds.dtype).clamp_min(1e-12)
        if float((norms - 1).abs().max()) > 1e-3:
            for power, words in (
                (-1.0, "the gate seems to miss the decoder norm: compare value * |W_dec| instead"),
                (1.0, "the gate seems to count the decoder norm, which it should not"),
            ):
                other = JumpRelu(gate.thresholds * norms**power, inclusive=gate.inclusive)
                yield _Cause(
                    "decoder_norm_gate", words, dictionary.but(gate=other), factor=0.9, by_l0=True
                )
        rule = ">" if gate.inclusive else ">="
        other = JumpRelu(gate.thresholds, inclusive=not gate.inclusive)
        words = f"many values lie exactly at the threshold, and {rule} fits better than the other"
        yield _Cause("threshold_rule", words, dictionary.but(gate=other), factor=0.97, by_l0=True)
    if dictionary.is_autoencoder and bool(dictionary.decoder_bias.any()):
        if dictionary.center is None:
            words = "the pre-bias seems skipped: subtract b_dec before encoding"
            other = dictionary.but(center=dictionary.decoder_bias)
        else:
            words = "b_dec seems subtracted before encoding, which it should not be"
            other = dictionary.but(center=None)
        yield _Cause("pre_bias", words, other, factor=0.8)


def _scaled(dictionary: SparseDictionary, base: Figures, x: Tensor, y: Tensor) -> Iterator[Alarm]:
    """Try other activation scales: folding twice, or not at all, is a factor."""
    if dictionary.skip is not None or dictionary.token_norm is not None:
        return
    best: tuple[Figures, float] | None = None
    step = max(1, len(x) // 256)
    few_x, few_y = x[::step], y[::step]
    few = measure(dictionary, few_x, few_y)
    for scale in _SCALES:
        other = measure(rescaled(dictionary, scale), few_x, few_y)
        if best is None or other.fvu < best[0].fvu:
            best = (other, scale)
    if best is None or not (best[0].fvu < 0.5 * few.fvu and few.fvu - best[0].fvu > 0.05):
        return
    found = measure(rescaled(dictionary, best[1]), x, y)
    words = (
        f"activations seem scaled by {1 / best[1]:.3g} too much: the normalisation was folded "
        "twice, or not at all"
    )
    yield Alarm("scale", _text(words, base, found), found.fvu)


def rescaled(dictionary: SparseDictionary, scale: float) -> SparseDictionary:
    """Return what the dictionary would be, had activations been scaled by a further factor."""
    n = dictionary.n_features
    up = torch.full((n,), scale, dtype=torch.float64)
    center = dictionary.center
    return dictionary.but(
        encoder=_scale_rows(dictionary.encoder, up),
        decoders=tuple(_scale_rows(decoder, 1 / up) for decoder in dictionary.decoders),
        decoder_bias=dictionary.decoder_bias / scale,
        center=None if center is None else center / scale,
    )


def _scale_rows(matrix: Matrix, scale: Tensor) -> Matrix:
    values = matrix.tensor()
    return Matrix.of(matrix.name, values * scale.to(values.device, values.dtype)[:, None])


def _explains(base: Figures, other: Figures, factor: float, expected_l0: float | None) -> bool:
    if other.fvu < factor * base.fvu and base.fvu - other.fvu > 1e-3:
        return True
    if expected_l0 is None:
        return False
    off, less = (abs(found.l0 - expected_l0) / expected_l0 for found in (base, other))
    return off > 0.1 and less < 0.5 * off and other.fvu < 1.05 * base.fvu


def _text(words: str, base: Figures, other: Figures) -> str:
    return (
        f"{words} (FVU {base.fvu:.3f} as it is, {other.fvu:.3f} otherwise; L0 {base.l0:.1f} and "
        f"{other.l0:.1f})"
    )


def _without_cause(
    dictionary: SparseDictionary, figures: Figures, expected_l0: float | None
) -> list[Alarm]:
    found: list[Alarm] = []
    known = dictionary.facts.get("expected_fvu")
    limit = WORST_FVU
    if isinstance(known, int | float):
        limit = max(3 * float(known), 0.1)
    if not figures.fvu <= limit:
        usual = f" (it was {known:.3f} when it was stored)" if isinstance(known, float) else ""
        found.append(
            Alarm(
                "unexplained",
                f"it explains {figures.explained_variance:.1%} of the variance at "
                f"{dictionary.reads}{usual}: model, layer, hook or convention is wrong, or the "
                "text is unlike what it was trained on",
            )
        )
    if figures.l0 == 0 or (
        expected_l0 is not None
        and not expected_l0 / L0_FACTOR <= figures.l0 <= expected_l0 * L0_FACTOR
    ):
        wanted = "some" if expected_l0 is None else f"about {expected_l0:g}"
        found.append(
            Alarm("l0", f"{figures.l0:.1f} features are active per token, where {wanted} should be")
        )
    return found


def _some(values: Tensor) -> Tensor:
    return values[:: max(1, len(values) // ROWS)][:ROWS]
