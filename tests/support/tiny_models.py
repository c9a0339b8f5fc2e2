"""Tiny random models of every listed family, and a tiny tokenizer, built offline from configs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 384

_CORPUS = [
    "Give the city name only, plain text. The capital of Germany is called simply Berlin",
    "Give the city name only, plain text. The capital of France is called simply Paris",
    "The capital of Italy is Rome. The capital of Japan is Tokyo. The capital of Spain is Madrid.",
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
    "One two three four five six seven eight nine ten. Question: what is it? Answer: the answer.",
] * 4

# What every family shares; each row of FAMILIES adds or overrides.
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MHA = {"num_key_value_heads": None}  # no grouped queries in these configurations

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "gpt2": {**_MHA, "model_type": "gpt2", "n_inner": 48, "tie_word_embeddings": True},
    "gpt2_untied": {**_MHA, "model_type": "gpt2", "n_inner": 48},
    "gpt_neox": {**_MHA, "model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox_sequential": {**_MHA, "model_type": "gpt_neox", "use_parallel_residual": False},
    "phi3": {"model_type": "phi3"},
    "olmo2": {"model_type": "olmo2"},
}

# Families that no table row describes: they must be resolved from their structure.
UNLISTED: dict[str, dict[str, Any]] = {
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True},
    "granite": {
        "model_type": "granite",
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.25, "tie_word_embeddings": True},
    "phi": {"model_type": "phi"},
    "gptj": {**_MHA, "model_type": "gptj", "n_inner": 48, "rotary_dim": 4},  # blocks return tuples
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of the tiny model of a family."""
    row = {**_BASE, **(FAMILIES.get(family) or UNLISTED[family]), **overrides}
    given = {key: value for key, value in row.items() if value is not None}
    return AutoConfig.for_model(given.pop("model_type"), **given)


def tiny(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a random model whose norms, gains and biases are all far from their defaults."""
    config = tiny_config(family, **overrides)
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
