"""Hugging Face causal language models: the real modules, with hooks for the length of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscope.errors import LensError, ModelError
from layerscope.models.backends.base import Capability, Execution, ModelInfo
from layerscope.models.backends.huggingface.hooks import (
    Point,
    Recorder,
    Resume,
    installed,
    running,
    stopping_after,
)
from layerscope.models.backends.huggingface.structure import Named, Structure
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

if TYPE_CHECKING:
    from layerscope.models.backends.base import NormChoice
    from layerscope.models.run import RunPlan

_LOGITS = Site("logits")


class HuggingFaceBackend:
    """Runs one `PreTrainedModel`; nothing of it is copied or rewritten."""

    name = "huggingface"
    capabilities = frozenset({Capability.GRADIENTS})

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.model = model
        self.structure = structure
        self.info = _info(model, structure)
        self._points = dict(_points(structure))
        self._resume = Resume([block.whole.module for block in structure.blocks])
        accepted = inspect.signature(structure.base.forward).parameters
        self._takes_position_ids = "position_ids" in accepted

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

    def sites(self) -> Sequence[Site]:
        """Return every site that can be captured and edited, in the order of the forward pass."""
        return [*self._points, _LOGITS]

    def why_not(self, site: Site) -> str | None:
        """Return None when the site is available, else one line saying why not and what is."""
        if site in self._points or site == _LOGITS:
            return None
        if site.kind == "resid_mid":
            return (
                f"'{site}' does not exist in {self.info.family}: attention and MLP of a block read "
                "the same residual in parallel; use resid_pre, attn_out, mlp_out or resid_post"
            )
        kinds = dict.fromkeys(known.kind for known in self.sites())
        return (
            f"'{site}' is not available on the {self.name} backend, which offers {', '.join(kinds)}"
        )

    def execute(self, plan: RunPlan) -> Execution:
        """Run one forward pass; every site of the plan has fired, and nothing is left behind."""
        if self.model.training:
            raise ModelError("the model is in training mode, where dropout acts; call model.eval()")
        recorder = Recorder(plan)
        wanted = set(recorder.sites)
        points = {site: point for site, point in self._points.items() if site in wanted}
        blocks = self.structure.blocks
        last = None if plan.stop_after is None else blocks[plan.stop_after].whole.module
        logits = None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(plan.gradients))
            start = plan.start
            stack.enter_context(
                self._resume.watching()
                if start is None
                else self._resume.at(recorder, start.layer, start.residual)
            )
            stack.enter_context(running(recorder))
            stack.enter_context(installed(recorder, points))
            stack.enter_context(stopping_after(recorder, last))
            logits = self._forward(plan)
            if logits is not None and _LOGITS in wanted:
                logits = recorder.visit(_LOGITS, logits)
        return Execution(recorder.finish(), logits)

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
        if structure.position_embedding is not None:
            positions = _weight(structure.position_embedding.module).detach()
            expected = expected + positions[position_ids.to(positions.device)].to(expected)
        return expected

    def _forward(self, plan: RunPlan) -> Tensor | None:
        batch = plan.batch
        inputs: dict[str, Any] = {
            "input_ids": batch.ids.to(self.device),
            "attention_mask": batch.attention_mask.to(self.device, torch.long),
            "use_cache": False,
            "return_dict": True,
        }
        if self._takes_position_ids:
            inputs["position_ids"] = batch.position_ids().to(self.device)
        if plan.logits == "all":
            return self.model(**inputs).logits
        hidden: Tensor = self.structure.base(**inputs).last_hidden_state
        if plan.logits is None:
            return None
        columns = plan.logits.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self._head(hidden[rows[:, None], columns])

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
    n_heads = int(config.num_attention_heads)
    return ModelInfo(
        family=structure.family,
        n_layers=len(structure.blocks),
        d_model=embedding.shape[1],
        d_vocab=_weight(structure.head.module).shape[0],
        n_embeddings=embedding.shape[0],
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        n_ctx=getattr(config, "max_position_embeddings", None),
        architecture="pre_norm" if structure.blocks[0].input_norm else "post_norm",
    )


def _points(structure: Structure) -> list[tuple[Site, Point]]:
    """Return where each site lives, in the order of the forward pass."""
    scale = structure.branch_scale
    points = [(Site("embed"), Point(structure.embedding.module, "output"))]
    for layer, block in enumerate(structure.blocks):
        points += [
            (Site("resid_pre", layer), Point(block.whole.module, "input")),
            (Site("attn_in", layer), Point(block.attention.module, "input")),
            (Site("attn_out", layer), Point(block.attention_out.module, "output", scale)),
        ]
        if not structure.parallel:
            reader = block.mlp_norm or block.mlp
            points.append((Site("resid_mid", layer), Point(reader.module, "input", shared=True)))
        points += [
            (Site("mlp_in", layer), Point(block.mlp.module, "input")),
            (Site("mlp_out", layer), Point(block.mlp_out.module, "output", scale)),
            (Site("resid_post", layer), Point(block.whole.module, "output")),
        ]
    return [*points, (Site("final_norm"), Point(structure.final_norm.module, "output"))]


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
