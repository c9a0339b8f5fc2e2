"""Raw and norm lenses on a fake model whose norms can be told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerscope.errors import LensError
from layerscope.lenses import LENS_NAMES, NormLens, RawLens, get_lens


class FakeModel:
    """Three blocks; the norm of row k multiplies by k + 1, the final norm by 100."""

    n_layers = 3

    def __init__(self) -> None:
        self.seen: list[torch.dtype] = []

    def norm_at(self, row: int, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        final = choice == "final" or row == self.n_layers
        factor = 100 if final else row + 1

        def norm(residual: Tensor) -> Tensor:
            self.seen.append(residual.dtype)
            return residual * factor

        return ("model.norm" if final else f"model.layers.{row}.input_layernorm"), norm


RESIDUAL = torch.tensor([[1.0, -2.0]])


def test_raw_lens_returns_the_residual_in_float32() -> None:
    lens = get_lens("raw", FakeModel())
    out = lens.transform(RESIDUAL.to(torch.bfloat16), 0)
    assert isinstance(lens, RawLens)
    assert out.dtype == torch.float32
    assert torch.equal(out, RESIDUAL)
    assert lens.norm_module(2) == ""
    assert lens.norm_choice == "none"


def test_norm_lens_uses_the_final_norm_at_every_row_by_default() -> None:
    lens = get_lens("norm", FakeModel())
    assert isinstance(lens, NormLens)
    assert lens.norm_choice == "final"
    for row in range(4):
        assert torch.equal(lens.transform(RESIDUAL, row), RESIDUAL * 100)
        assert lens.norm_module(row) == "model.norm"


def test_next_norm_uses_the_following_block_and_the_final_norm_last() -> None:
    lens = get_lens("norm", FakeModel(), norm="next_norm")
    factors = [float(lens.transform(RESIDUAL, row)[0, 0]) for row in range(4)]
    assert factors == [1, 2, 3, 100]
    assert [lens.norm_module(row) for row in (0, 2, 3)] == [
        "model.layers.0.input_layernorm",
        "model.layers.2.input_layernorm",
        "model.norm",
    ]


def test_the_norm_runs_in_the_captured_dtype_and_the_result_is_float32() -> None:
    model = FakeModel()
    out = get_lens("norm", model).transform(RESIDUAL.to(torch.bfloat16), 1)
    assert model.seen == [torch.bfloat16]
    assert out.dtype == torch.float32


def test_no_gradient_is_kept() -> None:
    assert (
        not get_lens("norm", FakeModel())
        .transform(RESIDUAL.clone().requires_grad_(), 1)
        .requires_grad
    )


@pytest.mark.parametrize("row", [-1, 4])
@pytest.mark.parametrize("name", LENS_NAMES)
def test_a_row_that_does_not_exist_is_refused(name: str, row: int) -> None:
    lens = get_lens(name, FakeModel())
    with pytest.raises(LensError, match="rows 0"):
        lens.transform(RESIDUAL, row)
    with pytest.raises(LensError, match="rows 0"):
        lens.norm_module(row)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(LensError, match="did you mean 'norm'"):
        get_lens("nrom", FakeModel())
    with pytest.raises(LensError, match="did you mean 'next_norm'"):
        get_lens("norm", FakeModel(), norm="nextnorm")  # pyright: ignore[reportArgumentType]
