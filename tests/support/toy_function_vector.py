"""A planted function vector: examples show a shift modulo 8, one head carries it to the query.

Inputs are t0 to t7, labels t8 to t15; an example is an input and its label, the prompt ends in a
query. In block 0 a head looks one back and the MLP finds each label's shift; head (1, 3) averages
the shifts over the labels; the last MLP adds the shift to the query. Other heads write where nobody
reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from layerscope.models import LanguageModel
from support.toys import bare_gpt2

N = 8
CARRIER = (1, 3)
HEADS = tuple((layer, head) for layer in range(3) for head in range(4))
SHOTS = 6
GAIN = 60.0

_X, _Y, _PREVIOUS, _SHIFT, _MEAN, _OUT, _JUNK = (slice(N * i, N * i + N) for i in range(7))
_ONE = 7 * N
_PLACE = 7 * N + 1
_SHARP = 60.0


def planted() -> LanguageModel:
    """Return the model, in float64."""
    toy = bare_gpt2(n_layers=3, n_heads=4, d_model=96, d_mlp=N * N, d_vocab=2 * N, n_ctx=21)
    eye = torch.eye(N, dtype=torch.float64)
    toy.embed[:N, _X], toy.embed[N:, _Y] = eye, eye
    toy.embed[:, _ONE] = 1.0
    places = torch.eye(21, dtype=torch.float64)
    toy.positions[:, _PLACE : _PLACE + 21] = places
    # (0, 0): the query of place p asks for the key of place p - 1.
    toy.w_q(0, 0)[_PLACE + 1 : _PLACE + 21, :20] = _SHARP * places[:20, :20]
    toy.w_k(0, 0)[_PLACE : _PLACE + 20, :20] = places[:20, :20]
    _copy(toy, (0, 0), _X, _PREVIOUS)
    # (1, 3): everyone looks at labels.
    toy.w_q(1, 3)[_ONE, 0] = _SHARP
    toy.w_k(1, 3)[_Y, 0] = 1.0
    _copy(toy, CARRIER, _SHIFT, _MEAN)
    for head in HEADS:
        if head not in (CARRIER, (0, 0)):
            _copy(toy, head, _X, _JUNK)
    for i in range(N):
        for j in range(N):
            _both(toy, 0, N * i + j, (_PREVIOUS, i), (_Y, j), (_SHIFT, (j - i) % N), 1.0)
            _both(toy, 2, N * i + j, (_X, i), (_MEAN, j), (_OUT, (i + j) % N), GAIN)
    toy.unembed[N:, _OUT] = eye
    return toy.model()


def _copy(toy, head, source, target) -> None:
    eye = torch.eye(N, dtype=torch.float64)
    toy.w_v(*head)[source, :N] = eye
    toy.w_o(*head)[:N, target] = eye


def _both(toy, layer, neuron, first, second, write, gain) -> None:
    """Let a neuron fire by how far two features are both there."""
    for slots, index in (first, second):
        toy.w_in(layer)[slots.start + index, neuron] = 1.0
    toy.b_in(layer)[neuron] = -1.0
    toy.w_out(layer)[neuron, write[0].start + write[1]] = gain


@dataclass(frozen=True)
class Shown:
    """One query of the task "add `shift`" in three prompts, and its answer's id."""

    shift: int
    query: int
    clean: str
    shuffled: str
    zero_shot: str
    target: int
    votes: tuple[int, ...]
    """The shift of each shuffled example."""


def shown(shift: int, count: int, seed: int = 0) -> list[Shown]:
    """Draw prompts of six examples; a shuffled one leaves no label in its place."""
    rng = Random(100 * seed + shift)
    found: list[Shown] = []
    while len(found) < count:
        inputs = [rng.randrange(N) for _ in range(SHOTS)]
        order = list(range(SHOTS))
        while any(place == item for place, item in enumerate(order)):
            rng.shuffle(order)
        labels = [(x + shift) % N for x in inputs]
        mixed = [labels[item] for item in order]
        query = rng.randrange(N)
        votes = tuple((y - x) % N for x, y in zip(inputs, mixed, strict=True))
        found.append(
            Shown(
                shift,
                query,
                _prompt(inputs, labels, query),
                _prompt(inputs, mixed, query),
                f"t{query}",
                N + (query + shift) % N,
                votes,
            )
        )
    return found


def probability_of(shift: int, votes) -> float:
    """Return P(answer) by hand: a softmax over eight labels' votes and eight idle inputs."""
    logits = GAIN * np.bincount(votes, minlength=N) / len(votes)
    weights = np.exp(logits - logits.max())
    return float(weights[shift] / (weights.sum() + N * np.exp(-logits.max())))


def _prompt(inputs, labels, query) -> str:
    examples = [f"t{x} t{N + y}" for x, y in zip(inputs, labels, strict=True)]
    return " ".join([*examples, f"t{query}"])
