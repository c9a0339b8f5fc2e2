"""The one face of a model that everything above talks to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from layerscope.allocator import keep_freed_memory
from layerscope.errors import (
    CapabilityError,
    ConfigError,
    PromptError,
    nearest,
)
from layerscope.models import identities
from layerscope.models.backends.base import Backend, Cache, Capability, NormChoice
from layerscope.models.batched_gradients import BatchedGradients
from layerscope.models.chat import Tuning, find_tuning
from layerscope.models.edits import Edit, Positions
from layerscope.models.generation import Generation, Piece, Sampling, Stream
from layerscope.models.generation.loop import Settings, end_ids, start
from layerscope.models.identities import IdentityReport
from layerscope.models.prompts import PaddingSide, PromptsLike, TokenBatch, tokenize
from layerscope.models.run import Capture, Gradients, Logits, Packed, RunResult, Start, plan
from layerscope.models.sites import Site
from layerscope.models.vocabulary import decode_tokens, token_strings
from layerscope.products import Products
from layerscope.products import products as matrix_products
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layerscope.models.backends.huggingface.loading import DeviceMap, LoadedModel
    from layerscope.models.backends.mlx.loading import LoadedMlx
    from layerscope.models.backends.transformer_lens.loading import LoadedLens

    Source: TypeAlias = str | Path | PreTrainedModel | nn.Module
    Opened: TypeAlias = tuple[Backend, LoadedModel | LoadedLens | LoadedMlx, IdentityReport | None]

_BACKENDS = ("huggingface", "mlx", "transformer_lens")


def load(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str = "huggingface",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    instruct: bool | None = None,
    device_map: DeviceMap | None = None,
) -> LanguageModel:
    """Load a causal language model one can look into.

    With a model on the CPU, the process keeps memory that tensors free (`keep_freed_memory`).

    Args:
        source: Hugging Face id, local folder, or a `PreTrainedModel` that is already built (then
            give its tokenizer; it is put in eval mode, and moved only where `device` says so); or a
            TransformerLens `HookedTransformer` or `TransformerBridge`, whatever `backend` says.
        tokenizer: replaces the one that comes with the model.
        backend: "huggingface", or "mlx" or "transformer_lens" (a folder or hub id; needs the extra
            of that name).
        device: "cpu", "cuda", "cuda:1", "mps" or "auto".
        dtype: "float32", "bfloat16", ...; by default float32 on a CPU, bfloat16 on CUDA.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model. Off unless asked for.
        verify: prove the model's identities (about one forward pass of 16 tokens). A model of a
            family that is not in the table is always proved, with a second pass resumed midway.
        instruct: whether the model was tuned on its chat template; None decides by its name and
            tokenizer (`LanguageModel.tuning` says how).
        device_map: "auto", or devices by module, to split a Hugging Face model over several GPUs.

    Raises:
        ModelError: the model cannot be loaded, or is not a causal language model.
        IdentityError: it fails an identity; says which, and by how much.
    """
    if backend not in _BACKENDS:
        raise ConfigError(
            f"unknown backend '{backend}'{nearest(backend, _BACKENDS)}; available: "
            f"{', '.join(_BACKENDS)}"
        )
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "verify": verify,
    }
    name, open_model = _opener(backend, source)
    if device_map is not None:
        if name != "huggingface":
            raise ConfigError(f"device_map is for the huggingface backend, not for {name}")
        options["device_map"] = device_map
    opened, loaded, report = open_model(source, **options)
    tuning = find_tuning(loaded.tokenizer, loaded.source, instruct=instruct)
    model = LanguageModel(opened, loaded, report, tuning=tuning)
    if model.device.type == "cpu":
        keep_freed_memory()
    return model


def _opener(backend: str, source: Source) -> tuple[str, Callable[..., Opened]]:
    """Return the backend that is meant, and what opens a model with it; none is imported early."""
    if backend == "mlx":
        from layerscope.models.backends.mlx import open_model

        return backend, open_model
    from layerscope.models.backends.transformer_lens.structure import kind_of

    if backend == "transformer_lens" or kind_of(source) is not None:
        from layerscope.models.backends.transformer_lens.loading import open_model

        return "transformer_lens", open_model
    from layerscope.models.backends.huggingface.opening import open_model

    return backend, open_model


class LanguageModel:
    """A language model: its sites, its tokenizer, and the one way to run it.

    Attributes:
        backend: what runs it.
        name: the last part of its id or folder.
        tokenizer: its tokenizer.
        identities: the report of the identities proved on load; None with ``verify=False``.
        tuning: whether it is instruct-tuned, and why; decides the default format of a `Prompt`.
    """

    def __init__(
        self,
        backend: Backend,
        loaded: LoadedModel | LoadedLens | LoadedMlx,
        report: IdentityReport | None = None,
        *,
        tuning: Tuning,
    ) -> None:
        self.backend = backend
        self.name: str = loaded.name
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.identities = report
        self.tuning = tuning
        self._loaded = loaded

    def __repr__(self) -> str:
        info = self.backend.info
        return (
            f"LanguageModel({self.name!r}, {info.family}, {info.n_layers} layers, "
            f"d_model {info.d_model}, vocabulary {info.d_vocab}, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')})"
        )

    @property
    def family(self) -> str:
        """Row of the family table, or ``structure:<model type>``."""
        return self.backend.info.family

    @property
    def architecture(self) -> str:
        """ "pre_norm", or "post_norm" where blocks read the residual stream without a norm."""
        return self.backend.info.architecture

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.backend.info.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.backend.info.d_model

    @property
    def d_vocab(self) -> int:
        """Width of the softmax; may exceed the tokenizer's size where a head is padded."""
        return self.backend.info.d_vocab

    @property
    def n_heads(self) -> int:
        """Number of query heads of a block."""
        return self.backend.info.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Number of key-value heads of a block."""
        return self.backend.info.n_kv_heads

    @property
    def n_ctx(self) -> int | None:
        """Longest prompt in tokens; None when nothing limits it."""
        return self.backend.info.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the residual stream begins."""
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.backend.dtype

    @property
    def unembedding(self) -> Unembedding:
        """The output head: a reference to the real weights."""
        return self.backend.unembedding

    def sites(self) -> list[Site]:
        """Return every site that can be captured and edited, in the order of the forward pass."""
        return list(self.backend.sites())

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real norm that a lens applies at a row.

        Row 0 is the embedding, row k the residual after block k-1. ``final`` is the last norm
        everywhere; ``next_norm`` is the input norm of block k. The last row always gets the final
        norm, and so does every row of a family whose blocks have no input norm (OLMo 2).

        Raises:
            LensError: the row or the choice does not exist.
        """
        return self.backend.norm_at(row, choice)

    def tokenize(
        self,
        prompts: PromptsLike,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = "right",
    ) -> TokenBatch:
        """Turn prompts into one padded batch that this model can take.

        Raises:
            PromptError: a prompt is empty, too long, or holds ids the model does not know.
        """
        return tokenize(
            self.tokenizer,
            prompts,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            max_length=self.n_ctx,
            vocab_size=self.backend.info.n_embeddings,
            tuning=self.tuning,
        )

    def run(
        self,
        prompts: PromptsLike,
        *,
        capture: Capture | str | Site | Sequence[str | Site] = (),
        edits: Sequence[Edit] = (),
        start: Start | None = None,
        stop_after: int | None = None,
        positions: Positions | None = None,
        logits: Logits = "all",
        products: Products = "default",
        gradients: Gradients = False,
        cache: Cache | None = None,
        keep_cache: bool = False,
        lean: bool = False,
        packed: Packed | None = None,
    ) -> RunResult:
        """Run one forward pass: the only way one happens.

        Args:
            prompts: text, ids, `Prompt`s, or a `TokenBatch`.
            capture: sites to keep, or a `Capture` that also names positions, device and dtype.
            edits: applied at their sites; several at one site in the order given.
            start: resume at a block from a stored residual.
            stop_after: last block to compute; the result then has no logits.
            positions: token positions to keep of every captured site, in the coordinates of each
                prompt without padding (negative: from its end); None keeps all columns.
            logits: "all" padded columns, the "last" token of each prompt, positions, or None.
                Only positions asked for are unembedded.
            products: "checked" uses the fastest float32-accurate matrix product of this machine,
                for this run only; "default" leaves torch as found.
            gradients: keep the autograd graph. "batched" prepares it for many cotangents at once
                (`batched_gradients.pull_back`): values then differ by rounding, the gains of norms
                get no gradient, and a gradient none of its own.
            cache: keys and values of an earlier run, whose rows the prompts continue (a text then
                gets no BOS); positions count the whole sequence.
            keep_cache: keep keys and values of all tokens so far in the result.
            lean: let a backend that can leave out what logits and captures of the final norm do not
                need of the last block; the rounding is then that of smaller products.
            packed: how the one row of `prompts` is made of rows that continue the cache; needs a
                start, and positions count the tokens of that one row.

        Raises:
            SiteError, CapabilityError, EditError, PromptError: the request, before anything runs.
        """
        if packed is not None and isinstance(prompts, TokenBatch):
            batch = prompts  # its pieces, not itself, must fit the context
        elif cache is None:
            batch = self.tokenize(prompts)
        else:
            batch = self.tokenize(prompts, prepend_bos=False).continuing(cache.mask)
            self._check_context(batch)
        planned = plan(
            self.backend,
            batch,
            capture=capture,
            edits=edits,
            start=start,
            stop_after=stop_after,
            positions=positions,
            logits=logits,
            gradients=gradients,
            cache=cache,
            keep_cache=keep_cache,
            lean=lean,
            packed=packed,
        )
        if gradients and Capability.GRADIENTS not in self.backend.capabilities:
            raise CapabilityError(self.backend.why_lacking(Capability.GRADIENTS))
        many = BatchedGradients() if gradients == "batched" else nullcontext()
        with matrix_products(products, device=self.device) as choice, many:
            execution = self.backend.execute(planned)
        return RunResult(
            activations=execution.activations,
            logits=execution.logits,
            batch=batch,
            positions=planned.captures[0].columns if planned.captures else None,
            products=choice.to_dict(),
            info=self.backend.info,
            cache=execution.cache,
        )

    def generate(
        self,
        prompts: PromptsLike,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        edits: Sequence[Edit] = (),
        capture: Capture | str | Site | Sequence[str | Site] = (),
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        eos: bool = True,
        keep_logits: bool = False,
        share_prompts: bool = False,
        stream: Callable[[Piece], object] | None = None,
    ) -> Generation:
        """Continue every prompt, reading it once and each new token once.

        Args:
            prompts: text, ids, `Prompt`s, or a `TokenBatch`.
            max_new_tokens: most tokens to generate per row.
            temperature: 0 takes the most likely token; else what logits are divided by to draw.
            top_p: draw among the most likely tokens that reach this probability together.
            top_k: draw among so many most likely tokens; None for all.
            seed: of the draws, or one per prompt; see `Sampling`.
            edits: applied while prompts and new tokens are read; an edit's `scope` says to which.
                Its positions count the whole sequence, negative ones from the prompt's end.
            capture: sites to keep of every generated token.
            stop: strings that end a row; its text is cut before them, its ids are not.
            stop_ids: ids that end a row, beside the model's own.
            eos: whether the model's end-of-sequence ids end a row.
            keep_logits: keep the logits that every token was chosen from.
            share_prompts: read what rows of equal prompts have in common once, up to the first
                token that an edit acts on. Many trials of one prompt are then as cheap to begin as
                one; the rounding is that of other batches.
            stream: called with every token as it is generated.

        Raises:
            PromptError, ConfigError, EditError, SiteError, CapabilityError: the request, before
                anything runs.
        """
        tokens = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            edits=edits,
            capture=capture,
            stop=stop,
            stop_ids=stop_ids,
            eos=eos,
            keep_logits=keep_logits,
            share_prompts=share_prompts,
        )
        if stream is not None:
            for piece in tokens:
                stream(piece)
        return tokens.result

    def stream(
        self,
        prompts: PromptsLike,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        edits: Sequence[Edit] = (),
        capture: Capture | str | Site | Sequence[str | Site] = (),
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        eos: bool = True,
        keep_logits: bool = False,
        share_prompts: bool = False,
    ) -> Stream:
        """Return the tokens of `generate` as they come: iterate over it, then take its `result`.

        Takes the arguments of `generate`, and raises what it raises.
        """
        settings = Settings(
            Sampling(temperature, top_p, top_k, seed if isinstance(seed, int) else tuple(seed)),
            max_new_tokens,
            (stop,) if isinstance(stop, str) else tuple(stop),
            tuple(stop_ids),
            end_ids(self) if eos else (),
        )
        return start(
            self,
            prompts,
            settings,
            edits=edits,
            capture=capture,
            keep_logits=keep_logits,
            share_prompts=share_prompts,
        )

    def _check_context(self, batch: TokenBatch) -> None:
        if self.n_ctx is None or batch.n_keys <= self.n_ctx:
            return
        for row, length in enumerate(batch.lengths):
            past = batch.past_length(row)
            if past + length > self.n_ctx:
                raise PromptError(
                    f"prompt {row} has {past} tokens in the cache and {length} more; the model's "
                    f"context holds {self.n_ctx}: shorten it by {past + length - self.n_ctx}"
                )

    def check(self) -> IdentityReport:
        """Run the identities again and return what they gave; raises nothing when one fails."""
        return identities.check(self.backend)

    def token_strings(self) -> list[str]:
        """Return the text of every token of the vocabulary, leading spaces kept; cached."""
        return token_strings(self.tokenizer, self.d_vocab)

    def decode_token(self, token_id: int) -> str:
        """Return the text of one token, leading space kept."""
        return decode_tokens(self.tokenizer, [token_id])[0]

    def provenance(self) -> dict[str, Any]:
        """Return what is needed to run the same model again, ready for JSON."""
        return {
            **self._loaded.provenance(),
            "backend": self.backend.name,
            "family": self.family,
            "verified": self.identities is not None,
            "instruct": self.tuning.instruct,
            "instruct_reason": self.tuning.reason,
        }
