"""TransformerLens models: the object itself runs, with torch hooks for the length of a run.

Hooks go on TransformerLens' hook points as plain torch hooks, after those that are there already:
they see what the object's own hooks leave, and ``reset_hooks`` and they do not know of each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layerscope.errors import CapabilityError, LensError, ModelError
from layerscope.models.backends.base import Cache, Capability, Execution
from layerscope.models.backends.huggingface.cache import KeyValueCache
from layerscope.models.backends.huggingface.hooks import (
    Carrier,
    Point,
    Recorder,
    Resume,
    installed,
    stopping_after,
)
from layerscope.models.backends.recording import Stop, current_run, running
from layerscope.models.backends.transformer_lens.cache import HookedCache, empty
from layerscope.models.backends.transformer_lens.points import Points
from layerscope.models.backends.transformer_lens.structure import HOOKED, LensStructure
from layerscope.models.batches import TokenBatch
from layerscope.models.identities import bound_of, relative_error
from layerscope.models.run import PlannedCapture, RunPlan
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from layerscope.models.backends.base import NormChoice

_PROBE_TOKENS = 8
_LOGITS = Carrier(nn.Identity(), "output")
# A bridge keeps the state of a pass in its own modules, so passes of one object take turns.
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


class TransformerLensBackend:
    """Runs one `HookedTransformer` or `TransformerBridge`; nothing of it is copied or rewritten."""

    name = "transformer_lens"

    def __init__(self, structure: LensStructure) -> None:
        self.model: Any = structure.model
        self.structure = structure
        self.info = structure.info
        self.capabilities = frozenset(
            {Capability.GRADIENTS, *({Capability.CACHE} if structure.takes_cache else ())}
        )
        self._continues: bool | None = None  # whether passes can be continued; None: not yet known
        self._points = Points(structure, self._probe)
        self._resume = Resume(structure.blocks)

    @property
    def device(self) -> torch.device:
        """Where the residual stream begins."""
        return self.structure.weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.structure.weight().dtype

    @property
    def unembedding(self) -> Unembedding:
        """The real output head, not a copy."""
        return self.structure.head()

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
        self._require_one_input()
        if plan.keep_cache or plan.cache is not None:
            self._require_cache(plan)
        return self._execute(plan)

    def _execute(self, plan: RunPlan) -> Execution:
        latest_z: dict[int, Tensor] = {}
        n_new = None if plan.cache is None else plan.batch.width

        def point(site: Site) -> Point:
            if site.kind == "logits":
                return Point(_LOGITS)
            return self._points.point(site, latest_z.__getitem__, n_new)

        recorder = Recorder(plan, point)
        planned = [*plan.captures, *plan.edits]
        by_head = {
            p.site.layer for p in planned if p.site.kind == "attn.out" and p.site.head is not None
        }
        with ExitStack() as stack:
            stack.enter_context(self._turn())
            stack.enter_context(torch.set_grad_enabled(bool(plan.gradients)))
            start = plan.start
            stack.enter_context(
                self._resume.watching()
                if start is None
                else self._resume.at(recorder, start.layer, start.residual)
            )
            stack.enter_context(running(recorder))
            stack.enter_context(_all_installed(recorder, recorder.carriers))
            for layer in sorted(layer for layer in by_head if layer is not None):
                stack.enter_context(self._remembering_z(recorder, layer, latest_z))
            logits, cache = self._forward(plan, recorder)
        return Execution(recorder.finish(), logits, cache)

    def why_lacking(self, capability: Capability) -> str:
        """Return one line on why this model has not a capability, and what would have it."""
        return (
            f"{self.info.family} on the {self.name} backend has no {capability.value} to continue "
            "or keep; run the whole sequence instead"
        )

    def norm_at(self, row: int, choice: NormChoice) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the dotted name and the real module that normalises row `row` for a lens.

        Row n_layers always gets the final norm. ``next_norm`` gives row k the input norm of block
        k, and the final norm where blocks read the stream without one.

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
            norm = self.structure.input_norms[row] or norm

        def normalise(residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
            weight = next(norm.module.parameters(), self.structure.weight())
            return norm.module(residual.to(weight.device, weight.dtype))

        return norm.name, normalise

    def expected_embedding(
        self, ids: Int[Tensor, "batch pos"], position_ids: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what block 0 should read for these ids, from the weights alone."""
        return self.structure.embedding(ids, position_ids)

    def _forward(self, plan: RunPlan, recorder: Recorder) -> tuple[Tensor | None, Cache | None]:
        batch, unembed = plan.batch, self.structure.unembed
        hooked = self.structure.kind == HOOKED
        last = None if plan.stop_after is None else self.structure.blocks[plan.stop_after]
        mask = batch.attention_mask if hooked else batch.key_mask
        inputs: dict[str, Any] = {"attention_mask": mask.to(self.device, torch.long)}
        native = self._native_cache(plan)
        if native is not None:
            inputs["past_kv_cache" if hooked else "past_key_values"] = native
        logits = cache = None
        with stopping_after(recorder, last), _unembedding(recorder, unembed, plan.logits):
            logits = self.model(batch.ids.to(self.device), return_type="logits", **inputs)
        if logits is not None and recorder.wants(_LOGITS):
            logits = recorder.visit(_LOGITS, logits)
        if plan.keep_cache:
            filled = HookedCache if hooked else KeyValueCache
            cache = filled.of(cast(Any, native), batch.key_mask)
        return logits, cache

    def _native_cache(self, plan: RunPlan) -> Any:
        """Return what the object's forward continues or fills; None for a run without a cache."""
        if plan.cache is not None:
            assert isinstance(plan.cache, KeyValueCache | HookedCache)
            return plan.cache.native()
        if not plan.keep_cache:
            return None
        if self.structure.kind != HOOKED:
            return KeyValueCache.empty()
        shape = (len(plan.batch), self.info.n_kv_heads, int(self.model.cfg.d_head))
        return empty(self.info.n_layers, shape, self.device, self.dtype)

    def _require_one_input(self) -> None:
        """Refuse options under which heads do not read one and the same input."""
        config = self.model.cfg
        for option in ("use_attn_in", "use_split_qkv_input"):
            if getattr(config, option, False):
                raise CapabilityError(
                    f"{option} gives every head a residual of its own to read, so there is no "
                    f"attn_in: turn it off (model.set_{option}(False))"
                )

    def _require_cache(self, plan: RunPlan) -> None:
        """Prove once that passes can be continued, and refuse what would not be kept.

        Raises:
            CapabilityError: a pass in pieces is not the pass in one piece; an edit of keys that are
                stored before the rotary embedding.
        """
        rotated = [p.site for p in plan.edits if p.site.kind == "attn.k"]
        if plan.keep_cache and rotated and self._points.rotates_past_keys:
            raise CapabilityError(
                f"an edit of '{rotated[0]}' cannot be kept: a HookedTransformer stores keys before "
                "the rotary embedding; edit k_pre, or run without keep_cache"
            )
        if self._continues is None:
            self._continues = self._continuation_error() <= bound_of(self.dtype)
        if not self._continues:
            raise CapabilityError(
                f"{self.info.family} cannot continue from stored keys and values: a pass in pieces "
                "gives other numbers than one in one piece; run the whole sequence instead"
            )

    def _continuation_error(self) -> float:
        """Return by how much two unlike rows in two pieces differ from one piece; relative."""
        known = min(self.info.n_embeddings, self.info.d_vocab)
        ids = [(13 + 7919 * index) % known for index in range(2 * _PROBE_TOKENS)]
        rows = (ids[:_PROBE_TOKENS], ids[_PROBE_TOKENS : 2 * _PROBE_TOKENS - 2])
        more = TokenBatch.from_ids([[ids[0], ids[1]], [ids[2], ids[3]]])
        whole = TokenBatch.from_ids([[*rows[0], *ids[:2]], [*rows[1], *ids[2:4]]])
        site = Site("final_norm")

        def last_two(batch: TokenBatch) -> PlannedCapture:
            columns = torch.tensor([[n - 2, n - 1] for n in batch.lengths])
            return PlannedCapture(site, columns, None, None)

        expected = self._execute(RunPlan(whole, (last_two(whole),), logits=None))
        first = self._execute(RunPlan(TokenBatch.from_ids(rows), logits=None, keep_cache=True))
        assert first.cache is not None
        again = more.continuing(first.cache.mask)
        second = RunPlan(again, (last_two(more),), logits=None, cache=first.cache)
        return relative_error(self._execute(second).activations[site], expected.activations[site])

    def _probe(self, carriers: Mapping[Site, Carrier]) -> Mapping[Site, Tensor]:
        """Run a few tokens and return what the carriers held that the pass reached."""
        self._require_one_input()
        known = min(self.info.n_embeddings, self.info.d_vocab)
        n_tokens = min(_PROBE_TOKENS, self.info.n_ctx or _PROBE_TOKENS)
        batch = TokenBatch.from_ids([[index % known for index in range(n_tokens)]])
        captures = tuple(PlannedCapture(site, None, None, None) for site in carriers)
        plan = RunPlan(batch, captures, logits=None)
        recorder = Recorder(plan, lambda site: Point(carriers[site]))
        with (
            self._turn(),
            torch.no_grad(),
            running(recorder),
            _all_installed(recorder, recorder.carriers),
        ):
            self._forward(plan, recorder)
        return recorder.activations

    @contextmanager
    def _turn(self) -> Generator[None]:
        """Wait until no other thread runs this object; a run within a run goes on."""
        with _turns_lock:
            turn = _turns.setdefault(self.model, threading.RLock())
        with turn:
            yield

    @contextmanager
    def _remembering_z(
        self, recorder: Recorder, layer: int, latest: dict[int, Tensor]
    ) -> Generator[None]:
        """Keep what the output projection of a block reads, after the edits of this run."""
        point = self._points.point(Site("attn.z", layer), latest.__getitem__, None)
        n_heads = self.info.n_heads

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if current_run() is recorder:
                latest[layer] = output if output.ndim == 4 else output.unflatten(-1, (n_heads, -1))

        handle = point.carrier.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _all_installed(recorder: Recorder, carriers: Iterable[Carrier]) -> Generator[None]:
    """Keep hooks on the carriers' modules; "query" stands for what attention reads."""
    carriers = list(carriers)
    handles: list[Any] = []
    try:
        for carrier in carriers:
            if carrier.side == "query":
                hook = _attention_hook(recorder, carrier)
                handles.append(carrier.module.register_forward_pre_hook(hook, with_kwargs=True))
        with installed(recorder, carriers):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_hook(recorder: Recorder, carrier: Carrier) -> Callable[..., Any]:
    """Return a hook for attention that gets its input thrice, for queries, keys and values."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Without kwargs: torch calls so when another thread's run has just removed its hooks.
        if current_run() is not recorder or kwargs is None:
            return None
        value = kwargs["query_input"]
        edited = recorder.visit(carrier, value)
        if edited is value:
            return None
        names = ("query_input", "key_input", "value_input")
        return args, {**kwargs, **dict.fromkeys(names, edited)}

    return hook


@contextmanager
def _unembedding(recorder: Recorder, unembed: nn.Module, logits: Any) -> Generator[None]:
    """Let only the asked-for positions be unembedded, or none; after the hooks that are there."""
    if isinstance(logits, str):
        yield
        return

    def choose(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        if current_run() is not recorder:
            return None
        if logits is None:
            raise Stop
        hidden: Tensor = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return (hidden[rows[:, None], logits.to(hidden.device)], *args[1:])

    handle = unembed.register_forward_pre_hook(choose)
    try:
        yield
    except Stop:
        pass
    finally:
        handle.remove()
