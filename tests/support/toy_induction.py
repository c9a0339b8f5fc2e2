"""A planted induction circuit: two heads that do all the work, and six that do none.

Residual slots: token | position | previous token | output | junk. Head 0.0 looks one token back
with score `beta` and copies that token into the slot of the previous token; head 1.0 matches the
present token with the previous tokens, again with score `beta`, and copies the one found to the
output.
All other heads are random and write to junk, which nobody reads.

With one place to look at among 7 and the metric below, everything has a closed form: see
`attention` and `exact_effect`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.models import LanguageModel
from support.toys import Toy, bare_gpt2

D_VOCAB, LENGTH, N_HEADS, SCALE = 12, 7, 4, 8.0
TOKEN = slice(0, D_VOCAB)
POSITION = slice(TOKEN.stop, TOKEN.stop + LENGTH)
PREVIOUS = slice(POSITION.stop, POSITION.stop + D_VOCAB)
OUTPUT = slice(PREVIOUS.stop, PREVIOUS.stop + D_VOCAB)
JUNK = slice(OUTPUT.stop, 52)


@dataclass(frozen=True)
class InductionToy:
    """The model and prompts ``... q t ... q`` whose next token is t.

    Attributes:
        clean: [prompt, pos] ids.
        corrupt: the same with the first q exchanged for a token that is nowhere else.
        targets: t.
        places: position of the first q.
    """

    model: LanguageModel
    beta: float
    clean: Int[Tensor, "prompt pos"]
    corrupt: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, " prompt"]
    places: Int[Tensor, " prompt"]

    def margin(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """Return the target's logit less the mean of all others."""
        target = logits.gather(-1, self.targets[:, None].to(logits.device))[:, 0]
        return target - (logits.sum(-1) - target) / (logits.shape[-1] - 1)

    def attention(self, strength: float = 1.0) -> Float[Tensor, " prompt"]:
        """Return what head 1.0 gives the token after the first q, where 0.0 wrote q.

        `strength` is how much of q, 1 for all, is left of what 0.0 wrote after the first q.
        """
        back = math.exp(self.beta)
        rows: list[float] = []
        for place in self.places.tolist():
            # The score of every place: beta times the share of q that 0.0 wrote there.
            shares = [0.0] * LENGTH
            for query in range(1, LENGTH):
                total = back + query
                if query >= place:
                    shares[query] = (back if query - 1 == place else 1.0) / total * strength
                if query == LENGTH - 1:  # the last token is q itself
                    shares[query] += 1.0 / total
            weights = [math.exp(self.beta * share) for share in shares]
            rows.append(weights[place + 1] / sum(weights))
        return torch.tensor(rows, dtype=torch.float64)

    def exact_effect(self) -> Float[Tensor, " prompt"]:
        """Return what the corrupt output of head 0.0 does to the clean margin, in closed form."""
        return (self.attention(0.0) - self.attention()) * SCALE * D_VOCAB / (D_VOCAB - 1)


def induction_toy(
    beta: float,
    *,
    n_prompts: int = 40,
    place: int | None = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> InductionToy:
    """Return the planted model and seeded prompts for it; `place` None draws one for each."""
    generator = torch.Generator().manual_seed(seed)
    toy = _planted(beta, generator, dtype)
    clean, corrupt, places = [], [], []
    for _ in range(n_prompts):
        order = torch.randperm(D_VOCAB, generator=generator)
        drawn = int(torch.randint(1, LENGTH - 2, (1,), generator=generator))
        places.append(drawn if place is None else place)
        row = order[:LENGTH].clone()
        row[-1] = row[places[-1]]
        other = row.clone()
        other[places[-1]] = order[LENGTH]
        clean.append(row)
        corrupt.append(other)
    ids, at = torch.stack(clean), torch.tensor(places)
    targets = ids.gather(1, at[:, None] + 1)[:, 0]
    return InductionToy(toy.model(), beta, ids, torch.stack(corrupt), targets, at)


def _planted(beta: float, generator: torch.Generator, dtype: torch.dtype) -> Toy:
    toy = bare_gpt2(
        n_layers=2,
        n_heads=N_HEADS,
        d_model=JUNK.stop,
        d_vocab=D_VOCAB,
        n_ctx=LENGTH,
        dtype=dtype,
    )
    tokens, places = torch.eye(D_VOCAB, dtype=dtype), torch.eye(LENGTH, dtype=dtype)
    with torch.no_grad():
        toy.embed[:, TOKEN] = tokens
        toy.positions[:, POSITION] = places
        toy.unembed[:, OUTPUT] = SCALE * tokens
        toy.w_q(0, 0)[POSITION, :LENGTH] = beta * places
        toy.w_k(0, 0)[POSITION, :LENGTH] = torch.diag(places.new_ones(LENGTH - 1), 1)
        toy.w_v(0, 0)[TOKEN, :D_VOCAB] = tokens
        toy.w_o(0, 0)[:D_VOCAB, PREVIOUS] = tokens
        toy.w_q(1, 0)[TOKEN, :D_VOCAB] = beta * tokens
        toy.w_k(1, 0)[PREVIOUS, :D_VOCAB] = tokens
        toy.w_v(1, 0)[TOKEN, :D_VOCAB] = tokens
        toy.w_o(1, 0)[:D_VOCAB, OUTPUT] = tokens
        for layer in (0, 1):
            for head in range(1, N_HEADS):
                for matrix in (toy.w_q(layer, head), toy.w_k(layer, head), toy.w_v(layer, head)):
                    matrix.copy_(torch.randn(matrix.shape, generator=generator, dtype=dtype) / 2)
                out = toy.w_o(layer, head)[:, JUNK]
                out.copy_(torch.randn(out.shape, generator=generator, dtype=dtype))
    return toy
