"""A slot machine whose workings are planted: one feature decides, another only differs.

Every token has "bias" in coordinate 1. The last token of a safe prompt has about 2 in coordinate 0,
which "stop" reads against the constant that "bet" reads; coordinate 2 differs as much between the
groups and is read by nothing, coordinate 3 varies in both alike.
"""

from __future__ import annotations

from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import layerscope
from layerscope.experiments.causal_features import Game, Task
from layerscope.features import DictionarySet, Matrix, SparseDictionary
from layerscope.features.architectures import JumpRelu
from layerscope.models import LanguageModel, Site
from support.toys import bare_gpt2

DECIDES, DIFFERS, IDLE = 0, 2, 3
WORDS = ("stop", "bet", *(f"w{i}" for i in range(8)), *(f"s{i}" for i in range(40)),
         *(f"r{i}" for i in range(40)))  # fmt: skip
FEATURES = 12


def machine(*, reads: float = 2.0) -> tuple[LanguageModel, DictionarySet]:
    """Return the model, and the dictionary of its only block: one feature per coordinate.

    `reads` is how strongly "stop" reads the deciding coordinate.
    """
    toy = bare_gpt2(n_layers=1, n_heads=1, d_model=16, d_vocab=len(WORDS), n_ctx=16)
    rng = Random(0)
    toy.embed[:, 1] = 1.0
    for at, word in enumerate(WORDS):
        if word[0] in "sr" and word[1:].isdigit():
            safe = word[0] == "s"
            toy.embed[at, DECIDES] = (2.0 if safe else 0.6) + 0.3 * rng.random()
            toy.embed[at, DIFFERS] = (0.6 if safe else 2.0) + 0.3 * rng.random()
            for other in range(IDLE, FEATURES):
                toy.embed[at, other] = 1.0 + rng.random()
    toy.unembed[:, 1] = -30.0
    toy.unembed[0, 1], toy.unembed[0, DECIDES] = 0.0, reads
    toy.unembed[1, 1] = 2.6
    words = {word: at for at, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0")
    model = layerscope.load(toy.hf, tokenizer=tokenizer)
    thresholds = torch.full((FEATURES,), 0.1, dtype=torch.float64)
    thresholds[1] = 100.0  # the constant is no feature
    directions = torch.eye(FEATURES, 16, dtype=torch.float64)
    site = Site("resid_post", 0)
    dictionary = SparseDictionary(
        reads=site,
        writes=[site],
        encoder=Matrix.of("encoder", directions),
        decoders=[Matrix.of("decoder", directions)],
        gate=JumpRelu(thresholds),
        bias=torch.zeros(FEATURES, dtype=torch.float64),
        decoder_bias=torch.zeros(16, dtype=torch.float64),
    )
    return model, DictionarySet("machine", [dictionary])


def task() -> Task:
    """Return prompts of both groups, apart for the contrast and for the patches."""

    def games(letter: str, first: int, last: int) -> tuple[Game, ...]:
        return tuple(Game(f"w{i % 8} w{i % 3} {letter}{i}") for i in range(first, last))

    return Task(
        "machine",
        {"safe": games("s", 0, 30), "risky": games("r", 0, 30)},
        {"safe": games("s", 30, 36), "risky": games("r", 30, 36)},
    )
