"""Blocks with their attention patterns and the scales of their norms held at a prompt's values."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.stream import FrozenNorm, freeze_norm
from layerscope.models import (
    Apply,
    Capture,
    Edit,
    EditContext,
    LanguageModel,
    Replace,
    Scale,
    Site,
    Start,
    TokenBatch,
)
from layerscope.models.edits import EditFunction

_AFFINE = 0.05  # far above rounding in half precision, far below what a norm does


class HeldBlocks:
    """What holds the blocks of one prompt.

    Args:
        model: the model.
        batch: the prompt, one row without padding.
        residuals: its residuals, row 0 the embedding, row k after block k - 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: TokenBatch,
        residuals: Float[Tensor, "row pos d_model"],
    ) -> None:
        self.model, self.batch, self.residuals = model, batch, residuals

    def mlp_norm(self, block: int) -> FrozenNorm:
        """Return the norm that a block's MLP reads through, held at its scales on this prompt.

        Raises:
            CapabilityError: it is neither a LayerNorm nor an RMSNorm.
        """
        parallel = self.model.backend.why_not(Site("resid_mid", block)) is not None
        reads = "resid_pre" if parallel else "resid_mid"
        values = self._values(block, reads)
        return self._norm(block, reads, "mlp_in", values[reads], values["mlp_in"])

    def edits(self, block: int, below: Tensor, variant: str) -> list[Edit]:
        """Return edits that hold one block at its values.

        Args:
            block: the block.
            below: what enters it, with a gradient.
            variant: "frozen" holds attention patterns and norms; "linear" what the MLP writes too.

        Raises:
            CapabilityError: the block has a pattern or a norm that cannot be held.
        """
        pattern = Site("attn.pattern", block)
        edits: list[Edit] = []
        why = self.model.backend.why_not(pattern) or self.model.backend.why_not_edit(pattern)
        if why is not None:
            raise CapabilityError(f"variant '{variant}' freezes attention patterns: {why}")
        parallel = self.model.backend.why_not(Site("resid_mid", block)) is not None
        mlp_reads = "resid_pre" if parallel else "resid_mid"
        values = self._values(block, mlp_reads)
        first = self._norm(block, "resid_pre", "attn_in", values["resid_pre"], values["attn_in"])
        edits.append(Apply(f"attn_in.{block}", lambda _v, _c: _apply(first, below)))
        edits.append(Apply(pattern, lambda _v, _c: values["pattern"]))
        factor = _ratio(values.get("attn.out"), values["attn_out"])
        if factor is not None:
            seen: dict[str, Tensor] = {}
            edits.append(Apply(f"attn.{block}.out", _remember(seen)))
            edits.append(Apply(f"attn_out.{block}", lambda _v, _c: seen["value"] * factor))
        if variant == "linear":
            edits.append(Apply(f"mlp_out.{block}", lambda _v, _c: values["mlp_out"]))
            return edits
        self._require_plain_mlp_output(block)
        second = self._norm(block, mlp_reads, "mlp_in", values[mlp_reads], values["mlp_in"])
        if parallel:
            edits.append(Apply(f"mlp_in.{block}", lambda _v, _c: _apply(second, below)))
        else:
            middle: dict[str, Tensor] = {}
            edits.append(Apply(f"resid_mid.{block}", _remember(middle)))
            edits.append(Apply(f"mlp_in.{block}", lambda _v, _c: _apply(second, middle["value"])))
        return edits

    def _require_plain_mlp_output(self, block: int) -> None:
        """Refuse a norm behind the MLP: it would stay live in a variant that says it is held.

        What is written must be affine in the neurons: their double moves it twice as far from what
        their absence leaves.
        """
        neurons = Site("mlp.post", block)
        why = self.model.backend.why_not(neurons) or self.model.backend.why_not_edit(neurons)
        if why is None:
            none, once, twice = (
                self._written(block, neurons, factor) for factor in (0.0, 1.0, 2.0)
            )
            size = (once - none).abs().max().clamp_min(torch.finfo(once.dtype).tiny)
            if float((twice - 2 * once + none).abs().max() / size) < _AFFINE:
                return
            why = "a norm behind the MLP cannot be held"
        raise CapabilityError(f"variant 'frozen' in block {block}: {why}; use 'total' or 'linear'")

    def _written(self, block: int, neurons: Site, factor: float) -> Tensor:
        site = f"mlp_out.{block}"
        below = self.residuals[block : block + 1]
        found = self.model.run(
            self.batch,
            start=Start(block, below),
            stop_after=block,
            capture=site,
            edits=[Scale(neurons, factor)],
            logits=None,
        )
        return found[site][0].detach().float()

    def _values(self, block: int, mlp_reads: str) -> dict[str, Tensor]:
        """Return sites of one block at their clean values; those that do not exist are left out."""
        inner = {"pattern": f"attn.{block}.pattern", "attn.out": f"attn.{block}.out"}
        kinds = ("resid_pre", mlp_reads, "attn_in", "attn_out", "mlp_in", "mlp_out")
        names = inner | {kind: f"{kind}.{block}" for kind in kinds}
        sites = {
            kind: Site.parse(name)
            for kind, name in names.items()
            if self.model.backend.why_not(Site.parse(name)) is None
        }
        start = Start(block, self.residuals[block : block + 1])
        found = self.model.run(
            self.batch,
            start=start,
            stop_after=block,
            capture=Capture(list(sites.values())),
            logits=None,
        )
        return {kind: found[site].detach() for kind, site in sites.items()}

    def _norm(
        self, block: int, reads: str, gives: str, before: Tensor, behind: Tensor
    ) -> FrozenNorm:
        """Hold the norm between two sites at the scales it has on this prompt."""

        def norm(rows: Tensor) -> Tensor:
            ids = self.batch.ids[:, :1].expand(1, rows.shape[0]).clone()
            batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (rows.shape[0],))
            edits = [] if reads == "resid_pre" else [Replace(f"{reads}.{block}", rows[None])]
            found = self.model.run(
                batch,
                start=Start(block, rows[None]),
                stop_after=block,
                capture=f"{gives}.{block}",
                edits=edits,
                logits=None,
            )
            return found[f"{gives}.{block}"][0]

        return freeze_norm(
            norm, before[0], behind[0], self.model.dtype, f"the norm before {gives}.{block}"
        )


def _apply(norm: FrozenNorm, values: Float[Tensor, "1 pos d_model"]) -> Tensor:
    """Return the frozen norm of values, with a gradient."""
    centred = values - values.mean(-1, keepdim=True) if norm.centred else values
    gain = norm.gain.to(values.device, values.dtype)
    bias = norm.bias.to(values.device, values.dtype)
    scale = norm.scale.to(values.device, values.dtype)
    return centred * gain * scale[:, None] + bias


def _remember(into: dict[str, Tensor]) -> EditFunction:
    def keep(values: Tensor, _context: EditContext) -> Tensor:
        into["value"] = values
        return values

    return keep


def _ratio(before: Tensor | None, behind: Tensor) -> Tensor | None:
    """Return what a norm behind attention multiplies every value by; None where there is none."""
    if before is None or torch.equal(before, behind):
        return None
    return torch.where(before == 0, torch.zeros_like(before), behind / before)
