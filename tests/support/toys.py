"""A GPT-2 of zero weights without norms, for circuits planted by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import layerscope
from layerscope.models import LanguageModel


@dataclass
class Toy:
    """The weights of a bare GPT-2, to be set in place; row vectors are multiplied from the left.

    Attention scores are q @ k without a scale, so a planted strength is the score itself. Rows of a
    matrix are inputs, columns outputs, everywhere but in `unembed` ([d_vocab, d_model], as is
    `embed`). Every dimension not set is zero. Call `model()` when all is planted.
    """

    hf: GPT2LMHeadModel

    @property
    def d_model(self) -> int:
        return self.hf.config.n_embd

    @property
    def d_head(self) -> int:
        return self.hf.config.n_embd // self.hf.config.n_head

    @property
    def embed(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.hf.transformer.wte.weight.data

    @property
    def positions(self) -> Float[Tensor, "n_ctx d_model"]:
        return self.hf.transformer.wpe.weight.data

    @property
    def unembed(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.hf.lm_head.weight.data

    def w_q(self, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
        return self._qkv(layer, head, 0)

    def w_k(self, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
        return self._qkv(layer, head, 1)

    def w_v(self, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
        return self._qkv(layer, head, 2)

    def w_o(self, layer: int, head: int) -> Float[Tensor, "d_head d_model"]:
        weight = self.hf.transformer.h[layer].attn.c_proj.weight.data
        return weight[head * self.d_head : (head + 1) * self.d_head]

    def w_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        return self.hf.transformer.h[layer].mlp.c_fc.weight.data

    def b_in(self, layer: int) -> Float[Tensor, " d_mlp"]:
        return self.hf.transformer.h[layer].mlp.c_fc.bias.data

    def w_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        return self.hf.transformer.h[layer].mlp.c_proj.weight.data

    def b_out(self, layer: int) -> Float[Tensor, " d_model"]:
        return self.hf.transformer.h[layer].mlp.c_proj.bias.data

    def model(self, *, verify: bool = True) -> LanguageModel:
        """Return the planted model behind the public interface; tokens are "t0", "t1", ..."""
        return layerscope.load(
            self.hf, tokenizer=word_tokenizer(self.hf.config.vocab_size), verify=verify
        )

    def _qkv(self, layer: int, head: int, part: int) -> Tensor:
        weight = self.hf.transformer.h[layer].attn.c_attn.weight.data
        first = part * self.d_model + head * self.d_head
        return weight[:, first : first + self.d_head]


def bare_gpt2(
    *,
    n_layers: int,
    n_heads: int,
    d_model: int,
    d_mlp: int = 1,
    d_vocab: int = 32,
    n_ctx: int = 64,
    activation: str = "relu",
    norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Toy:
    """Return a GPT-2 whose weights are all zero, without attention scale, and without norms.

    `norm` keeps layer norms (of gain 1). The head width is d_model / n_heads. `activation` is any
    that transformers knows ("relu", "linear", "gelu", ...).
    """
    config = GPT2Config(
        vocab_size=d_vocab,
        n_positions=n_ctx,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=d_mlp,
        activation_function=activation,
        scale_attn_weights=False,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" not in name:
                parameter.zero_()
    if not norm:
        model.transformer.ln_f = nn.Identity()
        for block in model.transformer.h:
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    return Toy(model)


def word_tokenizer(d_vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words "t0" to "t<d_vocab - 1>", without special tokens."""
    words = {f"t{number}": number for number in range(d_vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0")
