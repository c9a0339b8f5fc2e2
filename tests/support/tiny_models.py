"""Tiny random models of every family, and a tiny tokenizer, built offline from configs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from support.tiny_configs import CANDIDATES, FAMILIES, UNLISTED
from support.tiny_parts import BASE, VOCAB

_CORPUS = [
    "Give the city name only, plain text. The capital of Germany is called simply Berlin",
    "Give the city name only, plain text. The capital of France is called simply Paris",
    "The capital of Italy is Rome. The capital of Japan is Tokyo. The capital of Spain is Madrid.",
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
    "One two three four five six seven eight nine ten. Question: what is it? Answer: the answer.",
] * 4

# What a checkpoint holds in buffers rather than in parameters.
_LEARNED_BUFFERS = ("layer_scalar", "e_score_correction_bias", "expert_bias")


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of the tiny model of a family."""
    row = {**BASE, **{**CANDIDATES, **UNLISTED, **FAMILIES}[family], **overrides}
    given = {key: value for key, value in row.items() if value is not None}
    return AutoConfig.for_model(given.pop("model_type"), **given)


def tiny(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a random model whose norms, gains and biases are all far from their defaults."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):  # some classes draw what is not overwritten below
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                embedding = parameter.shape[0] == config.vocab_size or ".wpe" in name
                noise *= 1.0 if embedding else parameter.shape[-1] ** -0.5
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:  # the gain of a norm; Gemma's is an offset from one, and stays one
                parameter.add_(0.4 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(_LEARNED_BUFFERS):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype)


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, bos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 384 tokens; with `bos` it adds one BOS itself."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token="<pad>" if pad else None,
    )
