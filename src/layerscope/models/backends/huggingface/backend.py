"""Hugging Face causal language models: the real modules, with hooks for the length of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscope.errors import CapabilityError, LensError, ModelError
from layerscope.models.backends.base import Capability, Execution, ModelInfo
from layerscope.models.backends.huggingface.cache import (
    KeyValueCache,
    continuation_error,
    supports_cache,
)
from layerscope.models.backends.huggingface.hooks import (
    Carrier,
    Point,
    Recorder,
    Resume,
    installed,
    narrowed,
    stopping_after,
)
from layerscope.models.backends.huggingface.kernel import TAPS, KernelShape, Probe, has_kernel
from layerscope.models.backends.huggingface.one_operation import are_worth_it, in_one_operation
from layerscope.models.backends.huggingface.packing import (
    disprove_packing,
    only_ends,
    packed_inputs,
    shortest_window,
)
from layerscope.models.backends.huggingface.points import Points
from layerscope.models.backends.huggingface.quantised import capabilities_lost
from layerscope.models.backends.huggingface.structure import Named, Structure, is_listed
from layerscope.models.backends.recording import running
from layerscope.models.identities import bound_of
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from layerscope.models.backends.base import NormChoice
    from layerscope.models.batches import TokenBatch
    from layerscope.models.run import Packed, RunPlan

# More than the windows of tiny models; the pattern must be right in and out of one.
_PROBE_TOKENS = 8
# No module gives the logits as the model does, with every transform of the head.
_LOGITS = Carrier(nn.Identity(), "output")


class HuggingFaceBackend:
    """Runs one `PreTrainedModel`; nothing of it is copied or rewritten."""

    name = "huggingface"

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.model = model
        self.structure = structure
        self.info = _info(model, structure)
        held = {Capability.CACHE, Capability.PACKED} if supports_cache(model) else set[Capability]()
        self.capabilities = frozenset({Capability.GRADIENTS, *held}).difference(
            capabilities_lost(model)
        )
        self._points = Points(structure, self.info, self._probe_kernels)
        self._resume = Resume([block.whole.module for block in structure.blocks])
        accepted = inspect.signature(structure.base.forward).parameters
        self._takes_position_ids = "position_ids" in accepted
        # Why passes cannot be continued, "" where they can; None: not yet known.
        self._no_cache: str | None = None
        # The same of packed rows.
        self._no_packing: str | None = None
        self._window: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the residual stream begins."""
        return _weight(self.structure.embedding.module).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return _weight(self.structure.embedding.module).dtype

    @property
    def unembedding(self) -> Unembedding:
        """The real output head, not a copy."""
        head = self.structure.head.module
        bias = getattr(head, "bias", None)
        return Unembedding(
            _weight(head),
            bias if isinstance(bias, Tensor) else None,
            self.structure.logit_scale,
            self.structure.softcap,
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which the model is set to stop generating, beside its tokenizer's."""
        given: list[Any] = []
        for settings in (getattr(self.model, "generation_config", None), self.model.config):
            ids: Any = getattr(settings, "eos_token_id", None)
            given += ids if isinstance(ids, list) else [ids]
        return tuple(dict.fromkeys(id_ for id_ in given if isinstance(id_, int)))

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
        if self.model.training:
            raise ModelError("the model is in training mode, where dropout acts; call model.eval()")
        if plan.keep_cache or plan.cache is not None:
            self._require_cache()
        if plan.packed is not None:
            self._require_packing(plan.packed)
        batch = plan.batch
        if not self.structure.row.left_padding and batch.padding_side == "left":
            self._require_no_padding(batch)
        recorder = Recorder(plan, self._point)
        carriers = recorder.carriers
        kernels = {
            carrier.module for carrier in carriers if carrier.side not in ("input", "output")
        }
        blocks = self.structure.blocks
        if plan.packed is not None:
            kernels |= {block.attention.module for block in blocks}
        last = None if plan.stop_after is None else blocks[plan.stop_after].whole.module
        logits = cache = None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(bool(plan.gradients)))
            start = plan.start
            stack.enter_context(
                self._resume.watching()
                if start is None
                else self._resume.at(recorder, start.layer, start.residual)
            )
            stack.enter_context(running(recorder))
            stack.enter_context(installed(recorder, carriers))
            if kernels:
                stack.enter_context(TAPS.installed(kernels))
            if self.device.type == "cpu" and are_worth_it(plan):
                stack.enter_context(in_one_operation(recorder, self.structure))
            stack.enter_context(stopping_after(recorder, last))
            columns = plan.wanted() if plan.lean and plan.stop_after is None else None
            if columns is not None and columns.shape[1] < batch.width:
                stack.enter_context(narrowed(recorder, self._narrow(recorder, columns), columns))
            logits, cache = self._forward(plan, recorder)
            if logits is not None and recorder.wants(_LOGITS):
                logits = recorder.visit(_LOGITS, logits)
        return Execution(recorder.finish(), logits, cache)

    def _point(self, site: Site) -> Point:
        return Point(_LOGITS) if site.kind == "logits" else self._points[site]

    def _narrow(self, recorder: Recorder, columns: Int[Tensor, "batch pos"]) -> list[nn.Module]:
        """Return modules of the last block that may compute some positions alone."""
        block = self.structure.blocks[-1]
        inside = set(block.whole.module.modules())
        # What is seen or edited beyond the block's input must be whole.
        for carrier in recorder.carriers:
            entry = carrier.module is block.whole.module and carrier.side == "input"
            if carrier.module in inside and not entry:
                return []
        modules = [block.mlp, block.inner.out]
        packed = recorder.plan.packed
        if packed is not None and block.inner.out is not None and only_ends(packed, columns):
            recorder.asks_at_ends = block.attention.module
            modules.append(block.inner.query)
        return [part.module for part in modules if part is not None]

    def why_lacking(self, capability: Capability) -> str:
        """Return one line on why this model has not a capability, and what would have it."""
        lost = capabilities_lost(self.model).get(capability)
        if lost is not None:
            return lost
        return (
            f"{self.info.family} on the {self.name} backend has no {capability.value} to continue "
            "or keep; run the whole sequence instead"
        )

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real module that normalises row `row` for a lens.

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
        return norm.name, _callable(norm)

    def expected_embedding(
        self, ids: Int[Tensor, "batch pos"], position_ids: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what block 0 should read for these ids, from the weights alone."""
        structure = self.structure
        weight = _weight(structure.embedding.module).detach()
        expected = weight[ids.to(weight.device)]
        # The model holds the scale in its own dtype; so does what is expected of it.
        expected = expected * torch.tensor(
            structure.embedding_scale, dtype=weight.dtype, device=weight.device
        )
        if structure.positions is not None:
            table = structure.positions.table.detach()
            places = position_ids.to(table.device) + structure.positions.offset
            expected = expected + table[places].to(expected)
        norm = structure.embedding_norm
        return expected if norm is None else _callable(norm)(expected)

    def _inputs(self, plan: RunPlan) -> dict[str, Any]:
        batch = plan.batch
        if plan.packed is not None:
            return packed_inputs(plan, self.device)
        inputs: dict[str, Any] = {
            "input_ids": batch.ids.to(self.device),
            "use_cache": plan.keep_cache or plan.cache is not None,
            "return_dict": True,
        }
        # What continues a cache without any padding is placed by the model itself, and faster.
        mask = batch.key_mask
        if plan.cache is None or not bool(mask.all()):
            inputs["attention_mask"] = mask.to(self.device, torch.long)
            if self._takes_position_ids:
                inputs["position_ids"] = batch.position_ids().to(self.device)
        if plan.cache is not None:
            assert isinstance(plan.cache, KeyValueCache)
            inputs["past_key_values"] = plan.cache.native(keep=plan.keep_cache)
        elif plan.keep_cache:
            inputs["past_key_values"] = KeyValueCache.empty()
        return inputs

    def _forward(
        self, plan: RunPlan, recorder: Recorder
    ) -> tuple[Tensor | None, KeyValueCache | None]:
        inputs = self._inputs(plan)
        output = self.model(**inputs) if plan.logits == "all" else self.structure.base(**inputs)
        cache = None
        if plan.keep_cache:
            cache = KeyValueCache.of(
                output.past_key_values,
                plan.batch.key_mask,
                recorder.exchanged,
                # A cache has none, and new tokens without padding bring none.
                gaps=plan.cache is None or min(plan.batch.lengths) < plan.batch.width,
            )
        if plan.logits == "all":
            return output.logits, cache
        if plan.logits is None:
            return None, cache
        hidden: Tensor = output.last_hidden_state
        if hidden.shape[1] == 1:  # one new token: nothing to choose
            return self._head(hidden.expand(-1, plan.logits.shape[1], -1)), cache
        columns = plan.logits.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self._head(hidden[rows[:, None], columns]), cache

    def _require_cache(self) -> None:
        """Prove once that passes can be continued; models of the family table are tested for it.

        Raises:
            CapabilityError: a pass in pieces is not the pass in one piece.
        """
        if self._no_cache is None:
            if not self.structure.row.continues:
                self._no_cache = "a pass in pieces gives other numbers than one in one piece"
            else:
                self._no_cache = "" if is_listed(self.model) else self._disprove_cache()
        if self._no_cache:
            raise CapabilityError(
                f"{self.info.family} cannot continue from stored keys and values: "
                f"{self._no_cache}; run the whole sequence instead"
            )

    def _require_packing(self, packed: Packed) -> None:
        """Prove once that packed rows give what each gives alone.

        Raises:
            CapabilityError: they do not, or are longer than a window of this model.
        """
        if self._no_packing is None:
            self._window = shortest_window(self.model)
            self._no_packing = ""  # lets the proof's own packed pass through
            self._no_packing = self._disprove_packing()
        limit = self._window
        too_long = limit is not None and packed.n_columns > limit
        reason = f"its windows are of {limit} tokens" if too_long else self._no_packing
        if reason:
            raise CapabilityError(
                f"{self.info.family} cannot run packed rows: {reason}; run rows of one width"
            )

    def _disprove_packing(self) -> str:
        """Return why rows cannot be packed, "" where they can."""
        blocks = self.structure.blocks
        if not all(block.attends and has_kernel(block.attention.module) for block in blocks):
            return "not every block takes an attention kernel from transformers' registry"
        return disprove_packing(self)

    def _require_no_padding(self, batch: TokenBatch) -> None:
        if not bool(batch.attention_mask.all()):
            raise CapabilityError(
                f"padding on the left changes the numbers of {self.info.family}; pad on the right "
                "(padding_side='right')"
            )

    def _disprove_cache(self) -> str:
        """Return why a pass cannot be continued, "" where it can."""
        try:
            difference = continuation_error(
                self.structure.base, self.device, positions=self._takes_position_ids
            )
        # Foreign code: whatever it raises when given a cache means that it takes none.
        except Exception as error:
            return (
                f"given a cache, it raised {type(error).__name__}: {' '.join(str(error).split())}"
            )
        if difference <= bound_of(self.dtype):
            return ""
        return f"a pass in pieces differs from one in one piece by {difference:.2g}, relatively"

    def _probe_kernels(self) -> dict[nn.Module, KernelShape]:
        """Run a few tokens and see what every block's attention kernel reads."""
        attentions = [block.attention.module for block in self.structure.blocks]
        probe = Probe()
        known = min(self.info.n_embeddings, self.info.d_vocab)
        length = min(_PROBE_TOKENS, self.info.n_ctx or _PROBE_TOKENS)
        ids = torch.arange(length, device=self.device)[None] % known
        with torch.no_grad(), running(probe), TAPS.installed(attentions):
            self.structure.base(input_ids=ids, use_cache=False)
        return probe.shapes

    def _head(self, hidden: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """Return the logits of selected positions, in the model's own dtype and order."""
        logits: Tensor = self.structure.head.module(hidden)
        if self.structure.logit_scale != 1.0:
            logits = logits * self.structure.logit_scale
        cap = self.structure.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _info(model: PreTrainedModel, structure: Structure) -> ModelInfo:
    config = model.config.get_text_config()
    embedding = _weight(structure.embedding.module)
    # Some configurations hold sizes by layer; a block's own are found when it runs.
    layers = getattr(config, "per_layer_config", None)
    config = layers[0] if layers else config
    n_heads = int(config.num_attention_heads)
    return ModelInfo(
        family=structure.family,
        n_layers=len(structure.blocks),
        d_model=embedding.shape[1],
        d_vocab=_weight(structure.head.module).shape[0],
        n_embeddings=embedding.shape[0],
        n_heads=n_heads,
        n_kv_heads=_n_kv_heads(config) or n_heads,
        n_ctx=getattr(config, "max_position_embeddings", None),
        architecture="pre_norm" if structure.blocks[0].input_norm else "post_norm",
    )


def _n_kv_heads(config: Any) -> int | None:
    """Return the key-value heads of a configuration, under the names in use."""
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    found = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    return None if found is None else int(found)


def _callable(norm: Named) -> Callable[[Tensor], Tensor]:
    parameter = next(norm.module.parameters(), None)

    def normalise(residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if parameter is not None:
            residual = residual.to(parameter.device, parameter.dtype)
        return norm.module(residual)

    return normalise


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
