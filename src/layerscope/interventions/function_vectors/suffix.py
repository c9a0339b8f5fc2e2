"""Many variants of the last token of prompts, without reading the prompts again.

An edit at the last token changes nothing at earlier positions. So their keys and values are kept
from one pass, and a variant begins at its own block from the stored residual: one token instead of
a prompt, and the blocks from there on instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.models import Capture, Edit, LanguageModel, Start, TokenBatch
from layerscope.models.backends.base import Cache, Capability

BUDGET = 256 << 20  # bytes of keys and values that one pass of variants may hold

EditsOf = Callable[[Sequence[int]], Sequence[Edit]]
"""The edits of one pass, given the variants (by number) that are its rows."""


class LastToken:
    """Prompts that were read once, ready to be finished in many ways.

    Attributes:
        logits: [prompt, vocab] after the last token, without edits.
        z: by layer with attention, [prompt, head, d_head]: what each head gives at the last token.
        resid: [layer, prompt, d_model], what each block reads there.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[str], *, budget: int = BUDGET
    ) -> None:
        """Read the prompts; raises what `LanguageModel.run` raises."""
        self.model = model
        self._batch = batch = model.tokenize(list(prompts), padding_side="left")
        heads = attention_layers(model)
        sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
        sites += [f"attn.{layer}.z" for layer in heads]
        result = model.run(
            batch,
            capture=Capture(sites, positions=-1),
            logits="last",
            keep_cache=Capability.CACHE in model.backend.capabilities,
        )
        assert result.logits is not None
        self.logits: Float[Tensor, "prompt vocab"] = result.logits[:, -1]
        self.resid = torch.stack([result[site][:, 0] for site in sites[: model.n_layers]])
        self.z = {layer: result[f"attn.{layer}.z"][:, 0] for layer in heads}
        self._past: Cache | None = None
        if result.cache is not None and batch.width > 1:
            self._past = result.cache.before(result.cache.mask.shape[1] - 1)
        self._rows = max(1, budget // _bytes_of_row(model, batch.width))

    def __len__(self) -> int:
        return len(self._batch)

    def finish(
        self, prompts: Sequence[int], layer: int, edits: EditsOf
    ) -> Float[Tensor, "variant vocab"]:
        """Return the logits of variants; variant i finishes the prompt of number ``prompts[i]``.

        Args:
            prompts: which prompt each variant finishes.
            layer: first block that an edit touches; those below are not computed.
            edits: called with the variants of one pass, which are its rows in this order; what it
                returns acts at position -1.
        """
        parts: list[Tensor] = []
        for begin in range(0, len(prompts), self._rows):
            chunk = range(begin, min(begin + self._rows, len(prompts)))
            parts.append(self._pass([prompts[variant] for variant in chunk], layer, edits(chunk)))
        return torch.cat(parts)

    def _pass(self, rows: list[int], layer: int, edits: Sequence[Edit]) -> Tensor:
        whole = [self._batch.row_ids(row) for row in rows]
        if self._past is None and self._batch.width > 1:  # this model keeps no cache
            result = self.model.run(TokenBatch.from_ids(whole), edits=edits, logits="last")
        else:
            result = self.model.run(
                TokenBatch.from_ids([ids[-1:] for ids in whole]),
                start=Start(layer, self.resid[layer, rows][:, None]),
                cache=None if self._past is None else self._past.select(rows),
                edits=edits,
                logits="last",
            )
        assert result.logits is not None
        return result.logits[:, -1]


def attention_layers(model: LanguageModel) -> tuple[int, ...]:
    """Return the layers whose heads can be read and edited.

    Raises:
        CapabilityError: there is none.
    """
    layers = tuple(
        site.layer
        for site in model.sites()
        if str(site) == f"attn.{site.layer}.z" and site.layer is not None
    )
    if not layers:
        raise CapabilityError(
            f"{model.family} on the {model.backend.name} backend offers no heads (attn.L.z), which "
            "function vectors are made of"
        )
    return layers


def _bytes_of_row(model: LanguageModel, width: int) -> int:
    per_token = 2 * model.n_layers * model.d_model * model.dtype.itemsize
    return max(1, per_token * model.n_kv_heads // model.n_heads * width)
