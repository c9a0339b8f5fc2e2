"""Four small circuits with known truth, each a place where some method of attribution is blind.

Prompts are ``sink x query`` with x on (clean) or off (corrupt); the answer is token YES, whose
logit is the output slot and all other logits zero. Heads 0.0 and 0.1 look at x from everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerscope.interventions.attribution import AnswerProbability, Contrast, LogitDifference
from layerscope.models import LanguageModel
from support.toys import Toy, bare_gpt2

SINK, OFF, ON, QUERY, YES, NO = range(6)
# Dimensions of the residual stream.
IS_X, IS_ON, IS_SINK, ONE, FEATURE, OUTPUT = range(6)
BETA = 60.0


@dataclass(frozen=True)
class ZooToy:
    model: LanguageModel

    def contrast(self, metric: str = "logit", direction: str = "noise") -> Contrast:
        answers = torch.tensor([YES])
        measure = (
            LogitDifference(answers, torch.tensor([NO]))
            if metric == "logit"
            else AnswerProbability(answers)
        )
        clean, corrupt = torch.tensor([[SINK, ON, QUERY]]), torch.tensor([[SINK, OFF, QUERY]])
        return Contrast.of(self.model, clean, corrupt, measure, direction=direction)


def cancellation() -> ZooToy:
    """Head 0.0 writes to the output, and through the MLP of block 1 takes the same away."""
    toy = _bare()
    _reader(toy, 0, {OUTPUT: 1.0, FEATURE: 1.0})
    toy.w_in(1)[FEATURE, 0] = 1.0
    toy.w_out(1)[0, OUTPUT] = -1.0
    return ZooToy(toy.model())


def or_gate() -> ZooToy:
    """Heads 0.0 and 0.1 both write the feature; the MLP of block 1 gives at most 1 for it."""
    toy = _bare()
    _reader(toy, 0, {FEATURE: 1.0})
    _reader(toy, 1, {FEATURE: 1.0})
    toy.w_in(1)[FEATURE, :2] = 1.0
    toy.b_in(1)[1] = -1.0
    toy.w_out(1)[0, OUTPUT], toy.w_out(1)[1, OUTPUT] = 1.0, -1.0
    return ZooToy(toy.model())


def backup() -> ZooToy:
    """Head 0.0 writes the output and keeps head 1.0 at the sink; without it, 1.0 copies x."""
    toy = _bare()
    _reader(toy, 0, {OUTPUT: 1.0, FEATURE: 1.0})
    toy.w_q(1, 0)[ONE, 0], toy.w_q(1, 0)[FEATURE, 1] = BETA / 2, BETA
    toy.w_k(1, 0)[IS_X, 0], toy.w_k(1, 0)[IS_SINK, 1] = 1.0, 1.0
    toy.w_v(1, 0)[IS_ON, 0] = 1.0
    toy.w_o(1, 0)[0, OUTPUT] = 1.0
    return ZooToy(toy.model())


def saturated_metric() -> ZooToy:
    """Head 0.0 writes 20 to the output: the answer's probability is 1 to nine digits."""
    toy = _bare()
    _reader(toy, 0, {OUTPUT: 20.0})
    return ZooToy(toy.model())


def _bare() -> Toy:
    toy = bare_gpt2(n_layers=2, n_heads=4, d_model=16, d_mlp=2, d_vocab=6, n_ctx=8)
    toy.embed[:, ONE] = 1.0
    toy.embed[SINK, IS_SINK] = 1.0
    toy.embed[[OFF, ON], IS_X] = 1.0
    toy.embed[ON, IS_ON] = 1.0
    toy.unembed[YES, OUTPUT] = 1.0
    return toy


def _reader(toy: Toy, head: int, writes: dict[int, float]) -> None:
    toy.w_q(0, head)[ONE, 0] = BETA
    toy.w_k(0, head)[IS_X, 0] = 1.0
    toy.w_v(0, head)[IS_ON, 0] = 1.0
    for dimension, strength in writes.items():
        toy.w_o(0, head)[0, dimension] = strength


def linear_model(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> LanguageModel:
    """Return a random network without norms whose patterns are fixed and whose MLPs are linear."""
    toy = bare_gpt2(
        n_layers=3,
        n_heads=4,
        d_model=24,
        d_mlp=16,
        d_vocab=20,
        n_ctx=12,
        activation="linear",
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(matrix: torch.Tensor, scale: float) -> None:
        noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        matrix.copy_((noise * scale).to(dtype))

    draw(toy.embed, 0.3)
    draw(toy.positions, 0.3)
    draw(toy.unembed, 0.1)
    for layer in range(3):
        for head in range(4):
            draw(toy.w_v(layer, head), 0.15)
            draw(toy.w_o(layer, head), 0.15)
        draw(toy.w_in(layer), 0.1)
        draw(toy.w_out(layer), 0.1)
        draw(toy.b_in(layer), 0.1)
        draw(toy.b_out(layer), 0.1)
    return toy.model()
