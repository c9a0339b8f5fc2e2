"""Closed forms: what a fit must find where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerscope.errors import ConfigError, LensError
from layerscope.lenses import JacobianLens, PrismLens, TemperatureLens, TunedLens
from layerscope.lenses.fitting.loss import kl_to_teacher
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.prism import Moments, PrismOptions, solve_prism
from layerscope.lenses.fitting.states import States, normed
from layerscope.lenses.fitting.temperature import fit_on_prompts, fit_temperatures
from layerscope.lenses.fitting.translators import (
    at_identity,
    basis_of,
    hidden_of,
    in_residuals,
    regressed,
)
from layerscope.readout.unembedding import Unembedding

WIDTH, VOCABULARY = 6, 11


class Plain:
    """Two blocks; the norm changes nothing."""

    n_layers = 2

    def norm_at(self, row: int, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        return "norm", lambda residual: residual


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(**options: float) -> Unembedding:
    return Unembedding(normal(VOCABULARY, WIDTH, seed=9), normal(VOCABULARY, seed=8), **options)


def slow_kl(hidden: Tensor, teacher: Tensor, unembedding: Unembedding) -> Tensor:
    """KL(teacher || lens) with autograd through the formula of the head, written out."""

    def log_softmax(rows: Tensor) -> Tensor:
        z = rows @ unembedding.weight.T
        if unembedding.bias is not None:
            z = z + unembedding.bias
        z = z * unembedding.scale
        if unembedding.softcap is not None:
            z = unembedding.softcap * torch.tanh(z / unembedding.softcap)
        return z.log_softmax(-1)

    log_p, log_q = log_softmax(teacher), log_softmax(hidden)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}]
)
# A row at a time; three; all seven.
@pytest.mark.parametrize("budget", [1, 3 * 16 * VOCABULARY, 1 << 20])
def test_the_fused_loss_and_its_gradient_are_those_of_autograd(
    options: dict[str, float], budget: int
) -> None:
    unembedding = head(**options)
    teacher, hidden = normal(7, WIDTH), normal(3, 7, WIDTH, seed=1).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    loss = kl_to_teacher(hidden, teacher, unembedding, budget_bytes=budget)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), hidden)
    slow = slow_kl(hidden, teacher, unembedding)
    (expected,) = torch.autograd.grad((slow * weights).sum(), hidden)
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_low_precision_head_is_converted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Unembedding(normal(VOCABULARY, WIDTH).bfloat16())
    exact = Unembedding(whole.weight.float())
    monkeypatch.setattr("layerscope.lenses.fitting.loss._SLICE", 2 * WIDTH)
    hidden, teacher = normal(2, 5, WIDTH, seed=1).requires_grad_(), normal(5, WIDTH, seed=2)
    found = torch.autograd.grad(kl_to_teacher(hidden, teacher, whole).sum(), hidden)
    wanted = torch.autograd.grad(kl_to_teacher(hidden, teacher, exact).sum(), hidden)
    torch.testing.assert_close(found, wanted)


def test_rows_that_share_a_norm_go_through_it_together() -> None:
    calls: list[str] = []

    class Model:
        def norm_at(self, row: int, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
            name, factor = ("first", 2.0) if row < 2 else (f"own.{row}", 2.0**row)

            def norm(residual: Tensor) -> Tensor:
                calls.append(name)
                return residual * factor

            return name, norm

    residual = normal(4, 5, WIDTH)
    found = normed(Model(), residual.bfloat16(), "next_norm")  # type: ignore[arg-type]
    factors = torch.tensor([2.0, 2.0, 4.0, 8.0])[:, None, None]
    assert torch.equal(found, residual.bfloat16().float() * factors)
    assert calls == ["first", "own.2", "own.3"]


def test_temperatures_are_the_minimum_of_a_scan() -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(200, WIDTH)
    factors = torch.tensor([0.02, 1.0, 40.0])
    # The same states, too small or too large by a known factor; and noise on top.
    hidden = (
        teacher / factors[:, None, None]
        + 0.2 * normal(3, 200, WIDTH, seed=3) / factors[:, None, None]
    )
    found = fit_temperatures(hidden, teacher, unembedding)
    assert found.settled == [True] * 3
    for layer in range(3):
        best = float(found.inverse_temperature[layer])
        near = best * torch.linspace(0.8, 1.25, 91)
        scanned = [
            float(slow_kl(hidden[layer].double() * scale, teacher.double(), _double(unembedding)))
            for scale in near
        ]
        least = near[min(range(len(scanned)), key=scanned.__getitem__)]
        assert best == pytest.approx(float(least), rel=0.01)
        assert 0.5 < best / float(factors[layer]) < 1.1


def test_exact_copies_get_exact_temperatures_however_extreme() -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(50, WIDTH)
    hidden = torch.stack([teacher * 1e-4, teacher, teacher * 1e3])
    found = fit_temperatures(hidden, teacher, unembedding)
    torch.testing.assert_close(
        found.inverse_temperature, torch.tensor([1e4, 1.0, 1e-3]), rtol=1e-3, atol=0.0
    )


def test_a_row_that_says_the_opposite_gets_an_infinite_temperature() -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(50, WIDTH)
    found = fit_temperatures(-teacher[None], teacher, unembedding)
    assert found.inverse_temperature.tolist() == [0.0]
    lens = TemperatureLens(Plain(), {"inverse_temperature": torch.tensor([0.0, 2.0])})
    assert torch.equal(lens.transform(teacher, 0), torch.zeros_like(teacher))
    assert torch.equal(lens.transform(teacher, 1), 2 * teacher)
    assert torch.equal(lens.transform(teacher, 2), teacher)


def test_temperatures_are_found_in_few_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(50, WIDTH)
    hidden = torch.stack([teacher * scale for scale in (1e-3, 0.4, 1.0, 3.0, 500.0)])
    hidden += 0.1 * hidden.std((1, 2), keepdim=True) * normal(5, 50, WIDTH, seed=3)
    slopes: list[Tensor] = []

    def counted(*given: Any) -> Tensor:
        slopes.append(kl_to_teacher(*given))
        return slopes[-1]

    monkeypatch.setattr("layerscope.lenses.fitting.temperature.kl_to_teacher", counted)
    found = fit_temperatures(hidden, teacher, unembedding)
    assert found.settled == [True] * 5
    assert len(slopes) <= 20  # halving the widest bracket, 8 wide, would take 20 after finding it
    inverse = found.inverse_temperature.double().requires_grad_()
    scaled = hidden.double() * inverse[:, None, None]
    (slope,) = torch.autograd.grad(
        slow_kl(scaled, teacher.double(), _double(unembedding)).sum(), inverse
    )
    # Where the slope is steep, a part in a million of 1/tau is all there is between the signs.
    assert float((slope * inverse.detach()).abs().max()) < 1e-4


def test_states_that_are_not_finite_have_no_temperature() -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(50, WIDTH)
    hidden = torch.stack([teacher * 2, teacher * 2])
    hidden[0, 1, 2] = math.nan
    found = fit_temperatures(hidden, teacher, unembedding)
    assert found.inverse_temperature.tolist() == pytest.approx([1.0, 0.5], rel=1e-3)
    assert found.settled == [False, True]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 3.0}])
def test_temperatures_from_held_logits_equal_those_from_states(options: dict[str, float]) -> None:
    unembedding = head(**options)
    teacher = normal(3, WIDTH)
    hidden = torch.stack(
        [teacher * 5 + normal(3, WIDTH, seed=3), teacher * 0.2, teacher * 1e3, -teacher, teacher]
    )
    usual = fit_temperatures(hidden, teacher, unembedding)
    quick = fit_on_prompts(hidden, unembedding.logits(teacher), unembedding)
    torch.testing.assert_close(
        quick.inverse_temperature, usual.inverse_temperature, rtol=2e-3, atol=1e-6
    )
    assert quick.settled == usual.settled


def test_a_layer_that_is_not_finite_keeps_its_temperature_and_says_so() -> None:
    unembedding = Unembedding(normal(VOCABULARY, WIDTH, seed=9))
    teacher = normal(3, WIDTH)
    hidden = torch.stack([teacher * 2, teacher.clone()])
    hidden[0, 1, 2] = math.nan
    found = fit_on_prompts(hidden, unembedding.logits(teacher), unembedding)
    assert found.inverse_temperature.tolist() == pytest.approx([1.0, 1.0], rel=1e-3)
    assert found.settled == [False, True]


@pytest.mark.parametrize("whitening", ["full", "diagonal"])
def test_the_prism_recovers_a_planted_rotation(whitening: str) -> None:
    rotation, _ = torch.linalg.qr(normal(WIDTH, WIDTH, seed=4))
    spread = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 0.2])
    white = normal(4000, WIDTH)
    white = (white - white.mean(0)) / white.std(0, correction=0)
    if whitening == "full":  # make the sample exactly white
        values, vectors = torch.linalg.eigh(white.T @ white / len(white))
        white = white @ (vectors * values.rsqrt()) @ vectors.T
    turned = white @ rotation
    y_scale = spread.flip(0) if whitening == "full" else 1 / turned.std(0, correction=0)
    x, y = white * spread + 5.0, turned * y_scale - 1.0
    tensors = solve_prism(
        Moments.zero(WIDTH).plus(x, y),
        PrismOptions(whitening=whitening, rank=None),  # type: ignore[arg-type]
    )
    if whitening == "full":
        torch.testing.assert_close(tensors["rotation"], rotation, rtol=1e-3, atol=1e-3)
        assert float(tensors["gain"]) == pytest.approx(1.0, abs=1e-3)
    identity = tensors["rotation"] @ tensors["rotation"].T
    torch.testing.assert_close(identity, torch.eye(WIDTH), rtol=1e-4, atol=1e-4)
    lens = PrismLens(Plain(), tensors)
    error = (lens.transform(x, 0) - y).norm() / y.norm()
    assert float(error) < (1e-3 if whitening == "full" else 0.05)
    transposed = PrismLens(Plain(), {**tensors, "rotation": tensors["rotation"].T})
    assert float((transposed.transform(x, 0) - y).norm() / y.norm()) > 0.5


def test_a_prism_of_low_rank_keeps_the_correlated_directions() -> None:
    white = normal(5000, WIDTH)
    y = torch.cat([white[:, :2], normal(5000, WIDTH - 2, seed=5)], dim=1)
    tensors = solve_prism(Moments.zero(WIDTH).plus(white, y), PrismOptions(rank=2))
    guess = PrismLens(Plain(), tensors).transform(white, 0)
    assert float((guess[:, :2] - y[:, :2]).norm() / y[:, :2].norm()) < 0.1
    assert float(guess[:, 2:].norm() / y[:, 2:].norm()) < 0.1
    assert int(torch.linalg.matrix_rank(tensors["rotation"], rtol=1e-4)) == 2


def test_a_prism_of_too_few_rows_is_refused() -> None:
    moments = Moments.zero(WIDTH).plus(normal(2 * WIDTH, WIDTH), normal(2 * WIDTH, WIDTH, seed=1))
    with pytest.raises(LensError, match="too few to whiten 6"):
        solve_prism(moments, PrismOptions())
    with pytest.raises(ConfigError, match="rank is 0"):
        PrismOptions(rank=0)
    with pytest.raises(ConfigError, match="'diagonal' or 'full'"):
        PrismOptions(whitening="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [None, WIDTH])
def test_regression_recovers_a_planted_affine_map(rank: int | None) -> None:
    maps, bias = 0.5 * normal(2, WIDTH, WIDTH, seed=6), normal(2, WIDTH, seed=7)
    last = normal(3000, WIDTH)
    # last = x + x @ map + bias, so x = (last - bias) @ inverse(1 + map)
    inverse = torch.linalg.inv(torch.eye(WIDTH) + maps)
    x = (last[None] - bias[:, None]) @ inverse
    states = States(torch.cat([x, last[None]]), last)
    basis = basis_of(x)
    like = at_identity(2, WIDTH, TunedOptions(rank=rank), seed=0)
    found = regressed([states], basis, like)
    lens = TunedLens(Plain(), in_residuals(found, basis))
    for row in range(2):
        error = (lens.transform(x[row], row) - last).norm() / last.norm()
        assert float(error) < 0.02
    assert torch.equal(lens.transform(last, 2), last)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_lens_hands_over_what_its_translators_did_in_training(rank: int | None) -> None:
    residual = normal(3, 40, WIDTH, seed=5) * torch.tensor([9.0, 1.0, 1.0, 0.1, 3.0, 1.0]) + 4.0
    basis = basis_of(residual[:-1])
    start = at_identity(2, WIDTH, TunedOptions(rank=rank, temperature=True), seed=0)
    moved = {name: tensor + normal(*tensor.shape, seed=11) for name, tensor in start.items()}
    trained = hidden_of(Plain(), residual, moved, basis, "final")  # type: ignore[arg-type]
    lens = TunedLens(Plain(), in_residuals(moved, basis))
    for row in range(2):
        torch.testing.assert_close(
            lens.transform(residual[row], row), trained[row], rtol=1e-4, atol=1e-3
        )


def test_a_basis_holds_uncorrelated_coordinates_and_the_length_of_every_vector() -> None:
    mixed = normal(2, 500, WIDTH) @ normal(WIDTH, WIDTH, seed=3) + 7.0
    basis = basis_of(mixed)
    found = basis.coordinates(mixed)
    variances = found.square().mean(1)
    covariance = found.mT @ found / 500
    torch.testing.assert_close(covariance, torch.diag_embed(variances), rtol=1e-3, atol=1e-3)
    assert bool((variances.diff(dim=1) >= 0).all())
    lengths = (mixed - mixed.mean(1, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(found.norm(dim=-1), lengths, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.scale, mixed.square().mean((1, 2)).sqrt())


def test_a_row_that_is_not_finite_keeps_its_axes_and_spoils_no_other() -> None:
    rows = normal(2, 30, WIDTH)
    whole = basis_of(rows)
    rows[0, 3, 1] = math.inf
    broken = basis_of(rows)
    assert torch.equal(broken.axes[0], torch.eye(WIDTH))
    assert torch.equal(broken.axes[1], whole.axes[1])


def test_translators_start_as_the_identity_with_one_factor_that_is_not_zero() -> None:
    start = at_identity(2, WIDTH, TunedOptions(rank=3, temperature=True), seed=0)
    assert float(start["down"].abs().min()) > 0
    assert float(start["up"].abs().max()) == 0
    assert start["log_inverse"].tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="beyond the width"):
        TunedOptions(rank=WIDTH + 1).check(WIDTH)


def test_rates_fall_with_the_width_and_with_what_is_left_to_learn() -> None:
    nats = torch.tensor([32.0, 1.0, 1.0 / 32]) * math.log(2.0)
    torch.testing.assert_close(TunedOptions().rates(nats, 400), torch.tensor([0.04, 0.01, 0.0025]))
    torch.testing.assert_close(
        TunedOptions().rates(nats, 800), torch.tensor([0.02, 0.005, 0.00125])
    )
    narrow = TunedOptions().rates(nats, 64)  # the width stops counting below 200
    torch.testing.assert_close(narrow, torch.tensor([0.04, 0.02, 0.005]))
    given = TunedOptions(learning_rate=0.5).rates(nats, 400)
    assert given.tolist() == [0.5, 0.5, 0.5]


def test_the_jacobian_lens_multiplies_from_the_right_side() -> None:
    jacobians = normal(2, WIDTH, WIDTH)
    lens = JacobianLens(Plain(), {"jacobian": jacobians})
    rows = normal(4, WIDTH, seed=1)
    torch.testing.assert_close(
        lens.transform(rows, 1), torch.einsum("ij,rj->ri", jacobians[1], rows)
    )
    assert torch.equal(lens.transform(rows, 2), rows)
    with pytest.raises(LensError, match="norm='final'"):
        JacobianLens(Plain(), {"jacobian": jacobians}, norm="next_norm")
    with pytest.raises(LensError, match="shape"):
        JacobianLens(Plain(), {"jacobian": jacobians[:1]})


def _double(unembedding: Unembedding) -> Unembedding:
    return Unembedding(unembedding.weight.double(), scale=unembedding.scale)


def test_bits_and_nats_are_told_apart() -> None:
    """A fair coin against a sure one: the loss is in nats."""
    unembedding = Unembedding(torch.tensor([[30.0], [-30.0]]))
    loss = kl_to_teacher(torch.zeros(1, 1, 1), torch.ones(1, 1), unembedding)
    assert float(loss) == pytest.approx(math.log(2.0))
