"""Models of mlx-lm: the real modules, tapped for the length of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import torch
from jaxtyping import Float, Int
from mlx import nn
from torch import Tensor

from layerscope.errors import CapabilityError, LensError, ModelError
from layerscope.models.backends.base import Capability, Execution, ModelInfo
from layerscope.models.backends.mlx.arrays import to_mlx, to_torch, torch_dtype
from layerscope.models.backends.mlx.cache import KeyValueCache
from layerscope.models.backends.mlx.kernel import KernelShape
from layerscope.models.backends.mlx.layout import Layout
from layerscope.models.backends.mlx.passes import Nobody, Pass, parts
from layerscope.models.backends.mlx.points import LOGITS, Points
from layerscope.models.backends.mlx.recorder import Carrier, Recorder
from layerscope.models.backends.mlx.structure import Named, Structure, linear_shape
from layerscope.models.backends.mlx.taps import TAPS
from layerscope.models.backends.recording import Stop, outside, running
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import take
from layerscope.models.identities import relative_error
from layerscope.models.run import plan
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from layerscope.models.backends.base import NormChoice
    from layerscope.models.run import RunPlan

# More than the windows of tiny models; the pattern must be right in and out of one.
_PROBE_TOKENS = 8
_KERNEL_SIDES = ("query", "key", "value", "scores", "pattern")


class MlxBackend:
    """Runs one model of mlx-lm; what it hands out are tensors on the CPU, copies all of them."""

    name = "mlx"
    device = torch.device("cpu")

    def __init__(self, model: nn.Module, structure: Structure, config: Any) -> None:
        self.model = model
        self.structure = structure
        self.info = _info(structure, config)
        self.capabilities = frozenset({Capability.CACHE})
        self._points = Points(structure, self.info, self._probe_kernels)
        self._modules = {part.name: part.module for part in parts(structure)}
        with outside():
            self._dtype: mx.Dtype = structure.embedding.module(mx.array([[0]])).dtype

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return torch_dtype(self._dtype)

    @property
    def unembedding(self) -> Unembedding:
        """A copy of the output head, made once; of a quantised one in float32."""
        return self._unembedding

    @cached_property
    def _unembedding(self) -> Unembedding:
        head = self._head_module
        bias: Any = head.get("bias") if self.structure.head is not None else None
        return Unembedding(
            _dense(head),
            None if bias is None else to_torch(bias),
            self.structure.logit_scale,
            self.structure.softcap,
        )

    def sites(self) -> Sequence[Site]:
        """Return every site that can be captured, in the order of the forward pass."""
        return self._points.sites()

    def why_not(self, site: Site) -> str | None:
        """Return None when the site can be captured, else one line saying why not."""
        return self._points.why_not(site)

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when a site that can be captured can be edited too, else one line."""
        return self._points.why_not_edit(site)

    def trailing(self, site: Site, n_keys: int) -> tuple[int, ...]:
        """Return the axes of a site's value without those of batch and token positions."""
        return self._points.trailing(site, n_keys)

    def withdraw(self, kinds: Sequence[str], reason: str) -> None:
        """Refuse sites of these kinds from now on, and say why."""
        self._points.withdraw(kinds, reason)

    def self_checks(self, values: Mapping[Site, Tensor]) -> Iterable[tuple[str, float, str]]:
        """Yield (identity, error, where) for what lies inside the sublayers."""
        return self._points.checks(values)

    def execute(self, plan: RunPlan) -> Execution:
        """Run one forward pass; every site of the plan has fired, and nothing is left behind."""
        recorder = Recorder(plan, self._points.__getitem__)
        layout = Layout.of(plan.batch)
        blocks = self.structure.blocks
        start = None
        if plan.start is not None:
            residual = layout.to_model(plan.start.residual.detach().cpu())
            start = plan.start.layer, to_mlx(residual, self._dtype)
        end = None
        if plan.stop_after is not None:
            end = blocks[plan.stop_after].whole
        elif plan.logits != "all":
            end = self.structure.final_norm
        past = None
        if plan.cache is not None:
            assert isinstance(plan.cache, KeyValueCache)
            past = plan.cache.layers if layout.past is not None else None
        this = Pass(
            self.structure,
            layout,
            recorder,
            past=past,
            start=start,
            stop_after=None if end is None else end.module,
        )
        given = self._forward(this, layout.ids(plan.batch), recorder.carriers, end, plan.start)
        cache = None
        if plan.keep_cache:
            mask = plan.batch.key_mask.cpu()
            cache = KeyValueCache.of(mask, [cache.stored() for cache in this.caches])
        logits = self._logits(plan, layout, given)
        if logits is not None and recorder.wants(LOGITS):
            logits = recorder.visit(LOGITS, logits)
        return Execution(recorder.finish(), logits, cache)

    def why_lacking(self, capability: Capability) -> str:
        """Return one line on why this model has not a capability, and what would have it."""
        if capability is Capability.GRADIENTS:
            return f"the {self.name} backend computes no gradients; use 'huggingface'"
        return (
            f"{self.info.family} on the {self.name} backend has no {capability.value} to continue "
            "or keep; run the whole sequence instead"
        )

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real norm of row `row` for a lens, as it takes tensors.

        Row n_layers always gets the final norm. ``next_norm`` gives row k the input norm of block
        k, and the final norm in families whose blocks read the stream without one.

        Raises:
            LensError: the row does not exist, or the choice is neither of the two.
        """
        n_layers = self.info.n_layers
        if choice not in ("final", "next_norm"):
            raise LensError(f"norm choice '{choice}' is unknown; use 'final' or 'next_norm'")
        if not 0 <= row <= n_layers:
            raise LensError(f"row {row} does not exist: this model has rows 0 to {n_layers}")
        norm = self.structure.final_norm
        if choice == "next_norm" and row < n_layers:
            norm = self.structure.blocks[row].input_norm or norm
        return norm.name, self._callable(norm)

    def expected_embedding(
        self, ids: Int[Tensor, "batch pos"], position_ids: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what block 0 should read for these ids, from the weights alone."""
        structure = self.structure
        with outside():
            expected = to_torch(structure.embedding.module(to_mlx(ids)))
            # The model rounds the scale to its own dtype; so does what is expected of it.
            expected = expected * torch.tensor(structure.embedding_scale, dtype=expected.dtype)
            if structure.position_embedding is not None:
                positions = structure.position_embedding.module(to_mlx(position_ids))
                expected = expected + to_torch(positions).to(expected)
        return expected

    def require_plain_attention(self) -> None:
        """Refuse a model whose blocks do not all attend with the heads of its configuration.

        Raises:
            ModelError: latent attention, state-space blocks, or attention that calls no kernel.
        """
        shapes = self._points.kernels
        heads = {(shape.n_heads, shape.n_kv_heads) for shape in shapes.values()}
        if len(shapes) < self.info.n_layers or heads != {(self.info.n_heads, self.info.n_kv_heads)}:
            raise ModelError(
                f"the blocks of {self.info.family} do not all have attention with "
                f"{self.info.n_heads} heads and {self.info.n_kv_heads} of keys and values; use the "
                "'huggingface' backend"
            )

    def prove_cache(self) -> None:
        """Give up the cache unless two passes over a few tokens give what one gives."""
        known = min(self.info.n_embeddings, self.info.d_vocab)
        ids = [(5 + 31 * index) % known for index in range(2 * _PROBE_TOKENS)]
        first, second = TokenBatch.from_ids([ids[:-3]]), TokenBatch.from_ids([ids[-3:]])
        whole = plan(self, TokenBatch.from_ids([ids]), logits="last")
        try:
            cache = self.execute(plan(self, first, logits=None, keep_cache=True)).cache
            assert cache is not None
            rest = plan(self, second.continuing(cache.mask), logits="last", cache=cache)
            expected, found = self.execute(whole).logits, self.execute(rest).logits
            assert expected is not None and found is not None
            close = relative_error(found, expected) < 100 * torch.finfo(self.dtype).eps
        # A model that keeps something else breaks in ways of its own.
        except Exception:
            close = False
        if not close:
            self.capabilities = frozenset[Capability]()

    @property
    def _head_module(self) -> nn.Module:
        head = self.structure.head
        return self.structure.embedding.module if head is None else head.module

    def _forward(
        self,
        this: Pass,
        ids: mx.array,
        carriers: Iterable[Carrier],
        end: Named | None,
        start: object | None = None,
    ) -> mx.array | None:
        """Run the model; return what its last module, or the one named `end`, gave."""
        carriers = [carrier for carrier in carriers if carrier != LOGITS]
        structure = self.structure
        modules = [self._modules[carrier.name] for carrier in carriers]
        # Attention modules say which block a kernel belongs to, and get the mask of their block.
        modules += [block.attention.module for block in structure.blocks]
        if structure.position_embedding is not None:
            modules.append(structure.position_embedding.module)
        if start is not None:
            modules += [block.whole.module for block in structure.blocks]
        if end is not None:
            modules.append(end.module)
        inside = {c.name for c in carriers if c.side in _KERNEL_SIDES}
        kernels = [b.attention.module for b in structure.blocks if b.attention.name in inside]
        if structure.family.own_attention:
            for block in structure.blocks:
                if block.attention.name in inside:
                    modules += [part.module for part in (block.rope, block.out) if part]
        with ExitStack() as stack:
            stack.enter_context(running(this))
            stack.enter_context(TAPS.installed(modules, kernels))
            try:
                return self.model(ids, cache=this.caches)
            except Stop:
                return this.given

    def _logits(self, plan: RunPlan, layout: Layout, given: mx.array | None) -> Tensor | None:
        if plan.logits is None or given is None:
            return None
        values = layout.to_caller(to_torch(given))
        if isinstance(plan.logits, str):
            return values
        hidden = take(values, torch.arange(len(values)), plan.logits.cpu())
        with outside():
            return to_torch(self._head(to_mlx(hidden)))

    def _head(self, hidden: mx.array) -> mx.array:
        """Return the logits of selected positions, in the model's own dtype and order."""
        head: Any = self._head_module
        logits: mx.array = head.as_linear(hidden) if self.structure.head is None else head(hidden)
        if self.structure.logit_scale != 1.0:
            logits = logits * self.structure.logit_scale
        cap = self.structure.softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def _probe_kernels(self) -> dict[int, KernelShape]:
        """Run a few tokens and see what every block's attention kernel reads."""
        known = min(self.info.n_embeddings, self.info.d_vocab)
        length = min(_PROBE_TOKENS, self.info.n_ctx or _PROBE_TOKENS)
        batch = TokenBatch.from_ids([[index % known for index in range(length)]])
        layout = Layout.of(batch)
        shapes: dict[int, KernelShape] = {}
        this = Pass(self.structure, layout, Nobody(), shapes=shapes)
        seen = [Carrier(block.attention.name, "pattern") for block in self.structure.blocks]
        output = self._forward(this, layout.ids(batch), seen, None)
        assert output is not None
        mx.eval(output)
        return shapes

    def _callable(self, norm: Named) -> Callable[[Tensor], Tensor]:
        parameter = next(iter(_arrays(norm.module)), None)

        def normalise(residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            if residual.requires_grad and torch.is_grad_enabled():
                raise CapabilityError(
                    f"the mlx backend computes no gradients through {norm.name}; use the "
                    "'huggingface' backend"
                )
            with outside():
                given = to_mlx(residual, None if parameter is None else parameter.dtype)
                return to_torch(norm.module(given)).to(residual.device)

        return normalise


def _arrays(module: nn.Module) -> list[mx.array]:
    return [value for value in module.values() if isinstance(value, mx.array)]


def _dense(module: Any) -> Float[Tensor, "vocab d_model"]:
    """Return the weight of a linear module or embedding; of a quantised one in float32."""
    if not hasattr(module, "bits"):
        return to_torch(module.weight)
    scales, biases = module.scales, module.get("biases")
    affine = module.mode == "affine"
    return to_torch(
        mx.dequantize(
            module.weight,
            scales.astype(mx.float32) if affine else scales,
            None if biases is None else biases.astype(mx.float32),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        ).astype(mx.float32)
    )


def _info(structure: Structure, config: Any) -> ModelInfo:
    n_embeddings, d_model = linear_shape(structure.embedding.module)
    head = structure.embedding if structure.head is None else structure.head
    n_heads = int(config.num_attention_heads)
    return ModelInfo(
        family=structure.family.name,
        n_layers=len(structure.blocks),
        d_model=d_model,
        d_vocab=linear_shape(head.module)[0],
        n_embeddings=n_embeddings,
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        n_ctx=getattr(config, "max_position_embeddings", None),
        architecture="pre_norm" if structure.blocks[0].input_norm else "post_norm",
    )
