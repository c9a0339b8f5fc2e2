"""Every planted mistake raises an alarm that names it; a right dictionary raises none."""

from __future__ import annotations

import pytest
import torch
from planted import planted
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features import Matrix, SparseDictionary
from layerscope.features.architectures import Gate, JumpRelu, Relu, TopK
from layerscope.features.check import check, rescaled
from layerscope.features.figures import measure
from layerscope.models import Site

HERE, ELSEWHERE = Site("resid_post", 1), Site("resid_post", 2)


def autoencoder(
    encoder: Tensor,
    decoder: Tensor,
    gate: Gate,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    centered: bool = False,
) -> SparseDictionary:
    n, d = decoder.shape
    offset = torch.zeros(d) if offset is None else offset.float()
    return SparseDictionary(
        reads=HERE,
        writes=(HERE,),
        encoder=Matrix.of("encoder", encoder.float().contiguous()),
        decoders=(Matrix.of("decoder", decoder.float().contiguous()),),
        gate=gate,
        bias=torch.zeros(n) if bias is None else bias.float(),
        decoder_bias=offset,
        center=offset if centered else None,
    )


def codes(dictionary: SparseDictionary, x: Tensor) -> list[str]:
    return [alarm.code for alarm in check(dictionary, {HERE: x.float()}).alarms]


def test_a_transposed_square_decoder_is_named() -> None:
    p = planted(n=32, d=32, offset=0)
    right = autoencoder(p.directions, p.directions, JumpRelu(torch.full((32,), 0.5)))
    assert codes(right, p.x) == []
    wrong = autoencoder(p.directions, p.directions.T, JumpRelu(torch.full((32,), 0.5)))
    report = check(wrong, {HERE: p.x.float()})
    assert report.alarms[0].code == "transposed_decoder"
    assert "transposed" in report.alarms[0].text and not report.passed


def with_norms(gate_on_norm: bool) -> tuple[SparseDictionary, Tensor]:
    p = planted(offset=0)
    m = torch.linspace(0.3, 4.0, 24, dtype=torch.float64)[:, None]
    threshold = torch.full((24,), 0.5) / (m[:, 0].float() if gate_on_norm else 1.0)
    return autoencoder(p.directions / m, p.directions * m, JumpRelu(threshold)), p.x


def test_a_gate_without_the_decoder_norm_is_named() -> None:
    right, x = with_norms(True)
    assert codes(right, x) == []
    wrong, x = with_norms(False)
    assert codes(wrong, x)[0] == "decoder_norm_gate"


def test_values_at_the_threshold_are_noticed() -> None:
    # A coordinate is 2 or 0.5; what it reads of 0.5 lies exactly at the threshold.
    x = torch.where(planted(n=32, d=32).values > 0, 2.0, 0.5)
    threshold = torch.full((32,), 0.375)
    right = autoencoder(
        0.75 * torch.eye(32), torch.eye(32), JumpRelu(threshold), offset=torch.full((32,), 0.5)
    )
    assert codes(right, x) == []
    wrong = right.but(gate=JumpRelu(threshold, inclusive=True))
    report = check(wrong, {HERE: x.float()})
    assert report.alarms[0].code == "threshold_rule"
    assert "and > fits better" in report.alarms[0].text


def test_a_skipped_pre_bias_is_named_and_so_is_a_needless_one() -> None:
    p = planted(n=24, d=32, offset=0)
    offset = 2 * p.directions.sum(0) + p.offset
    x = p.x + offset
    right = autoencoder(p.directions, p.directions, Relu(), offset=offset, centered=True)
    assert codes(right, x) == []
    wrong = autoencoder(p.directions, p.directions, Relu(), offset=offset)
    assert codes(wrong, x)[0] == "pre_bias"
    bias = -(p.directions @ offset)
    right = autoencoder(p.directions, p.directions, Relu(), bias=bias, offset=offset)
    assert codes(right, x) == []
    wrong = autoencoder(p.directions, p.directions, Relu(), bias=bias, offset=offset, centered=True)
    assert codes(wrong, x)[0] == "pre_bias"


def coherent(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return unit directions that overlap (mean |cosine| above 0.1), and sparse sums of them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(48, 48, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    overlap = directions @ directions.T - torch.eye(48, dtype=torch.float64)
    assert 0.1 < float(overlap.abs().mean()) < 0.3
    return directions, planted(n=48, d=48, rows=300, offset=0).values @ directions


def test_mistakes_are_named_where_directions_overlap_too() -> None:
    """Exact recovery is out of reach there, so it is the change of FVU that has to tell."""
    directions, x = coherent()
    m = torch.linspace(0.3, 4.0, 48, dtype=torch.float64)[:, None]
    gate = JumpRelu(torch.full((48,), 1.1))
    offset = 2 * directions.sum(0)
    right = autoencoder(directions, directions, gate)
    assert codes(right, x) == []
    wrong = {
        "transposed_decoder": (autoencoder(directions, directions.T, gate), x),
        "decoder_norm_gate": (autoencoder(directions / m, directions * m, gate), x),
        "pre_bias": (autoencoder(directions, directions, gate, offset=offset), x + offset),
        "scale": (rescaled(right, 3.7), x),
    }
    assert {name: codes(*case)[0] for name, case in wrong.items()} == {name: name for name in wrong}
    centred = autoencoder(directions, directions, gate, offset=offset, centered=True)
    assert codes(centred, x + offset) == []


def test_another_layer_is_named() -> None:
    here, there = planted(seed=1), planted(seed=2)
    dictionary = autoencoder(
        there.directions, there.directions, JumpRelu(torch.full((24,), 0.5)), offset=there.offset
    )
    report = check(dictionary, {HERE: here.x.float(), ELSEWHERE: there.x.float()})
    assert report.alarms[0].code == "site"
    assert "resid_post.2" in report.alarms[0].text
    report = check(dictionary, {HERE: there.x.float(), ELSEWHERE: here.x.float()})
    assert report.passed


@pytest.mark.parametrize("scale", [0.25, 3.7])
def test_folding_twice_is_noticed(scale: float) -> None:
    p = planted()
    right = autoencoder(
        p.directions, p.directions, JumpRelu(torch.full((24,), 0.5)), offset=p.offset
    )
    assert codes(right, p.x) == []
    assert codes(rescaled(right, scale), p.x)[0] == "scale"


def test_without_a_cause_it_still_says_that_nothing_is_explained() -> None:
    p, other = planted(seed=1), planted(seed=5)
    dictionary = autoencoder(p.directions, p.directions, TopK(3))
    found = codes(dictionary, torch.randn(400, 32, dtype=torch.float64))
    assert found == ["unexplained"]
    few = autoencoder(other.directions, other.directions, JumpRelu(torch.full((24,), 1e6)))
    assert "l0" in codes(few, other.x)


def test_a_wrong_l0_alone_is_an_alarm() -> None:
    p = planted(offset=0)
    dictionary = autoencoder(p.directions, p.directions, Relu())
    report = check(dictionary, {HERE: p.x.float()}, expected_l0=3)
    assert [alarm.code for alarm in report.alarms] == ["l0"]  # rounding makes tiny values


def test_figures_are_what_they_say() -> None:
    p = planted()
    right = autoencoder(
        p.directions, p.directions, JumpRelu(torch.full((24,), 0.5)), offset=p.offset
    )
    found = measure(right, p.x.float())
    assert found.fvu < 1e-10 and found.l0 == 3 and found.dead == 0
    nothing = autoencoder(
        p.directions, p.directions, JumpRelu(torch.full((24,), 99.0)), offset=p.x.mean(0)
    )
    found = measure(nothing, p.x.float())
    assert found.fvu == pytest.approx(1, abs=1e-6) and found.l0 == 0 and found.dead == 1
    with pytest.raises(DictionaryError, match=r"activations of resid_post\.1"):
        check(right, {ELSEWHERE: p.x})
    with pytest.raises(DictionaryError, match="no activations"):
        measure(right, torch.zeros(0, 32))
