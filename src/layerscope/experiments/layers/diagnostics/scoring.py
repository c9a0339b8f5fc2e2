"""Held-out text, read once for several checks: what every lens makes of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.experiments.layers.diagnostics.heldout import HeldOut, held_out
from layerscope.experiments.layers.diagnostics.material import Material, row_sites
from layerscope.lenses.base import Lens
from layerscope.lenses.fitting.evaluate import depth_rows
from layerscope.measures.skip_layers import SKIPS
from layerscope.models import Capture, TokenBatch
from layerscope.readout import Reference, Request

_NOTHING = Request(
    entropy=False,
    top_k=0,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)
_AUDIT = replace(_NOTHING, entropy=True, kl_to_reference=True)
_KL = replace(_NOTHING, kl_to_reference=True)
LN2 = float(np.log(2.0))


@dataclass(frozen=True, eq=False)
class Audit:
    """What variants of a lens make of sampled positions, against the model's own prediction.

    Attributes:
        position: [place] position in its sequence.
        fraction: [place] the same as a fraction of the last one.
        kl_bits: by variant, [row, place] KL(variant || model), bits.
        entropy_bits: by variant, [row, place].
        rank: by variant, [row, place] rank of the gold token.
    """

    position: Int[np.ndarray, " place"]
    fraction: Float[np.ndarray, " place"]
    kl_bits: Mapping[str, Float[np.ndarray, "row place"]]
    entropy_bits: Mapping[str, Float[np.ndarray, "row place"]]
    rank: Mapping[str, Int[np.ndarray, "row place"]]


@dataclass(frozen=True, eq=False)
class Along:
    """The tuned lens beside the norm lens at every position, at 25, 50 and 75% depth.

    Attributes:
        fraction: [place] position as a fraction of its sequence.
        position: [place].
        baseline: [depth, place] KL(norm || model), bits.
        tuned: [depth, place] KL(tuned || model), bits.
    """

    fraction: Float[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]
    baseline: Float[np.ndarray, "depth place"]
    tuned: Float[np.ndarray, "depth place"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Cross-entropies of held-out text, one entry per scored token, nats.

    Attributes:
        text: what was scored.
        full: [token] by the model itself.
        skipped: by lens and number of blocks left out, [token] by the lens at that row.
        audit: what the variants of the tuned lens make of sampled positions; None without one.
        along: the tuned lens at every position; None without one.
    """

    text: HeldOut
    full: Float[np.ndarray, " token"]
    skipped: Mapping[str, Mapping[int, Float[np.ndarray, " token"]]]
    audit: Audit | None
    along: Along | None


def score(material: Material) -> Scores:
    """Read the held-out text batch by batch; nothing of a batch outlives it but numbers."""
    text = held_out(material)
    lenses = {name: lens for name, lens in material.lenses.items() if name != "raw"}
    lenses.setdefault("norm", material.norm)
    skips = [m for m in SKIPS if m < material.model.n_layers]
    full: list[np.ndarray] = []
    skipped: dict[str, dict[int, list[np.ndarray]]] = {
        name: {m: [] for m in skips} for name in lenses
    }
    audits: list[Audit] = []
    alongs: list[Along] = []
    named = material.variants
    stride = max(1, text.tokens // material.settings.audit_places)
    for batch in text.batches:
        states = _Batch.of(material, batch)
        head = _nats(material, states.final, states.following)
        full.append(head)
        for name, lens in lenses.items():
            for m in skips:
                row = material.model.n_layers - m
                hidden = lens.transform(states.residual[:, row], row)
                skipped[name][m].append(_nats(material, hidden, states.following))
        if named:
            audits.append(audit(material, named, *states.sampled(stride)))
            alongs.append(_along(material, states))
    return Scores(
        text,
        np.concatenate(full),
        {
            name: {m: np.concatenate(parts) for m, parts in by_skip.items()}
            for name, by_skip in skipped.items()
        },
        _joined(audits) if audits else None,
        _laid_end_to_end(alongs) if alongs else None,
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """All positions of some sequences that have a next token.

    Attributes:
        residual: [place, row, d_model].
        final: [place, d_model] what the head unembeds.
        following: [place] the next token.
        position: [place], and `length` [place] of its sequence.
    """

    residual: Float[Tensor, "place row d_model"]
    final: Float[Tensor, "place d_model"]
    following: Int[Tensor, " place"]
    position: Int[np.ndarray, " place"]
    length: Int[np.ndarray, " place"]

    @staticmethod
    def of(material: Material, batch: tuple[tuple[int, ...], ...]) -> _Batch:
        model = material.model
        sites = row_sites(model)
        found = model.run(
            TokenBatch.from_ids([list(sequence) for sequence in batch], padding_side="right"),
            capture=Capture(sites, device=material.device),
            logits=None,
            products=material.config.run_products,
        )
        owner = np.repeat(np.arange(len(batch)), [len(row) - 1 for row in batch])
        position = np.concatenate([np.arange(len(row) - 1) for row in batch])
        places = (torch.from_numpy(owner), torch.from_numpy(position))
        residual = torch.stack([found[site][places] for site in sites], dim=1)
        _, norm = model.norm_at(model.n_layers, "final")
        with torch.no_grad():
            final = norm(residual[:, -1]).float()
        return _Batch(
            residual,
            final,
            torch.tensor([token for row in batch for token in row[1:]]),
            position,
            np.repeat([len(row) for row in batch], [len(row) - 1 for row in batch]),
        )

    @property
    def fraction(self) -> Float[np.ndarray, " place"]:
        """Positions as fractions of the last one that has a next token."""
        return self.position / np.maximum(self.length - 2, 1)

    def sampled(self, stride: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """Return residuals, head inputs, positions and fractions of every so many positions."""
        keep = np.arange(stride // 2, len(self.position), stride)
        at = torch.from_numpy(keep)
        return self.residual[at], self.final[at], self.position[keep], self.fraction[keep]


def audit(
    material: Material,
    lenses: Mapping[str, Lens],
    residual: Float[Tensor, "place row d_model"],
    final: Float[Tensor, "place d_model"],
    position: Int[np.ndarray, " place"],
    fraction: Float[np.ndarray, " place"],
    gold: Int[Tensor, " place"] | None = None,
) -> Audit:
    """Read every row of some places through every variant.

    Args:
        material: the run.
        lenses: the variants by name.
        residual: of the places.
        final: what the model's head unembeds there.
        position: of the places.
        fraction: the same as fractions of a sequence.
        gold: whose rank is asked for; the model's own top-1 by default.
    """
    if gold is None:
        top = material.read(final, replace(_NOTHING, top_k=1)).top_ids
        assert top is not None
        gold = top[:, 0].long()
    kl: dict[str, np.ndarray] = {}
    entropy: dict[str, np.ndarray] = {}
    rank: dict[str, np.ndarray] = {}
    n_rows, n_places = residual.shape[1], residual.shape[0]
    for name, lens in lenses.items():
        found = material.read(
            material.through(lens, residual[:, None]).flatten(0, 1),
            _AUDIT,
            tokens=gold.repeat_interleave(n_rows)[:, None],
            reference=Reference(
                index=torch.arange(n_places).repeat_interleave(n_rows), hidden=final
            ),
        )
        assert found.reference is not None and found.reference.kl_to_bits is not None
        assert found.entropy_bits is not None and found.token_rank is not None
        for values, into in (
            (found.reference.kl_to_bits, kl),
            (found.entropy_bits, entropy),
            (found.token_rank[:, 0], rank),
        ):
            into[name] = values.view(n_places, n_rows).T.numpy()
    return Audit(position, fraction, kl, entropy, rank)


def _joined(audits: list[Audit]) -> Audit:
    return Audit(
        np.concatenate([part.position for part in audits]),
        np.concatenate([part.fraction for part in audits]),
        _by_name([part.kl_bits for part in audits]),
        _by_name([part.entropy_bits for part in audits]),
        _by_name([part.rank for part in audits]),
    )


def _by_name(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _along(material: Material, states: _Batch) -> Along:
    """Read three depths at every position through the norm lens and the tuned lens."""
    rows = sorted(set(depth_rows(material.model.n_layers).values()))
    index = torch.arange(len(states.final))
    found: dict[str, list[np.ndarray]] = {"baseline": [], "tuned": []}
    for name, into in found.items():
        for row in rows:
            hidden = material.variants[name].transform(states.residual[:, row], row)
            read = material.read(
                hidden, _KL, reference=Reference(index=index, hidden=states.final)
            ).reference
            assert read is not None and read.kl_to_bits is not None
            into.append(read.kl_to_bits.numpy())
    return Along(
        states.fraction, states.position, np.stack(found["baseline"]), np.stack(found["tuned"])
    )


def _laid_end_to_end(parts: list[Along]) -> Along:
    return Along(
        np.concatenate([part.fraction for part in parts]),
        np.concatenate([part.position for part in parts]),
        np.concatenate([part.baseline for part in parts], axis=1),
        np.concatenate([part.tuned for part in parts], axis=1),
    )


def _nats(
    material: Material, hidden: Float[Tensor, "place d_model"], following: Int[Tensor, " place"]
) -> Float[np.ndarray, " place"]:
    """Return the cross-entropy of the next tokens."""
    found = material.read(hidden, _NOTHING, tokens=following[:, None]).token_log2p
    assert found is not None
    return -found[:, 0].double().numpy() * LN2
