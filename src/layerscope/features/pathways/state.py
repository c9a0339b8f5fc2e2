"""One prompt, run once: residuals, cache, the features that are active, and the targets' values.

Every dictionary is read once. What is kept of it are the rows that matter: write directions of
features that are active on this prompt, and read rows of the targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import DictionaryError, PromptError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.library import DictionarySet
from layerscope.features.spaces import FeatureId, FeatureSpace
from layerscope.features.staging import plan_stages, stages
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.backends.base import Cache, Capability
from layerscope.models.prompts import PromptsLike
from layerscope.products import Products, choose
from layerscope.products import products as matrix_products

_ENCODED_BYTES = 256 * 2**20  # of dense feature values at a time


@dataclass(frozen=True, order=True)
class Target:
    """A feature at a position whose drivers are wanted.

    Attributes:
        feature: which feature.
        position: of the prompt without padding; negative counts from its end.
    """

    feature: FeatureId
    position: int = -1


@dataclass(frozen=True, eq=False)
class TargetState:
    """What a target reads and what it is on this prompt.

    Attributes:
        target: with its position counted from 0.
        row: row index of the residual it reads (row k is the residual after block k - 1).
        read: its read row in raw residual space.
        bias: its pre-activation is ``read . residual + bias``.
        pre_activation: its value before the gate. activation: and behind it.
        margin: how far the pre-activation lies above the gate's threshold; None where that depends
            on the other features.
    """

    target: Target
    row: int
    read: Float[Tensor, " d_model"]
    bias: float
    pre_activation: float
    activation: float
    margin: float | None

    @property
    def active(self) -> bool:
        """Whether the feature is active here."""
        return self.activation > 0.0


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one layer: one entry per position and feature, by position.

    Attributes:
        layer: block. row: row index of the residual they read and write.
        positions, ids, values: of each entry.
        unique: the features among them. which: index of each entry into `unique`.
        directions: raw-space write direction of each of `unique`, float32 at least.
        reads: their read rows, where kept.
        written_bias: what the dictionary writes beside its features.
    """

    layer: int
    row: int
    positions: Int[Tensor, " entry"]
    ids: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    unique: Int[Tensor, " feature"]
    which: Int[Tensor, " entry"]
    directions: Float[Tensor, "feature d_model"]
    reads: Float[Tensor, "feature d_model"] | None
    written_bias: Float[Tensor, " d_model"]

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, position: int) -> slice:
        """Return the entries of one position."""
        starts = self._starts
        return slice(*(starts[min(at, len(starts) - 1)] for at in (position, position + 1)))

    @cached_property
    def _starts(self) -> list[int]:
        """Return where each position's entries begin, and last where all end."""
        return [0, *torch.bincount(self.positions).cumsum(0).tolist()]


@dataclass(frozen=True, eq=False)
class PromptState:
    """A prompt as the model and its dictionaries saw it once.

    Attributes:
        prompt_id: what tables call it.
        batch: its ids, one row without padding.
        tokens: their strings.
        residuals: [row, pos, d_model], row 0 the embedding, row k the residual after block k - 1.
        cache: keys and values of all positions; None where the model keeps none.
        layers: active features by layer.
        targets: in the order given.
        space: the dictionaries' feature space.
        bytes_read: taken from the dictionaries' files for this state.
    """

    model: LanguageModel
    prompt_id: str
    batch: TokenBatch
    tokens: tuple[str, ...]
    residuals: Float[Tensor, "row pos d_model"]
    cache: Cache | None
    layers: dict[int, ActiveFeatures]
    targets: tuple[TargetState, ...]
    space: FeatureSpace
    bytes_read: int

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt."""
        return self.residuals.shape[1]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: LanguageModel,
        prompt: PromptsLike,
        dictionaries: DictionarySet,
        targets: Sequence[Target] = (),
        *,
        prompt_id: str = "0",
        keep_reads: bool = False,
        sources: bool = True,
        other_model: bool = False,
        products: Products = "checked",
    ) -> PromptState:
        """Run the prompt once, and read every dictionary once.

        Args:
            model: the model the dictionaries were made for.
            prompt: one prompt.
            dictionaries: autoencoders of the residual stream.
            targets: features whose read rows and values are wanted.
            prompt_id: what tables call it.
            keep_reads: keep read rows of active features too (to pull gradients back through the
                dictionaries themselves).
            sources: gather active features; without, only the targets' rows are read.
            other_model: accept dictionaries made for a model of another name.
            products: of the dictionaries; "checked" (the fastest float32-accurate product) or
                "default". The model's own are torch's.

        Raises:
            DictionaryError: a dictionary does not fit, is no autoencoder of the residual stream,
                or has no such feature.
            PromptError: not one prompt, or a target's position is beyond it.
        """
        batch = model.tokenize(prompt)
        if len(batch) != 1:
            raise PromptError(f"pathways look at one prompt at a time, not {len(batch)}")
        for dictionary in dictionaries:
            dictionary.require_model(model, other_model=other_model)
            residual_row(dictionary)
        residuals, cache = _run(model, batch)
        wanted: dict[int, list[tuple[int, Target]]] = defaultdict(list)
        for index, target in enumerate(targets):
            dictionaries.space.require([target.feature])
            wanted[target.feature.layer].append((index, _placed(target, batch.lengths[0])))
        before = dictionaries.bytes_read
        made = choose(products, device=model.device)
        layers: dict[int, ActiveFeatures] = {}
        found: dict[int, TargetState] = {}
        needed = dictionaries.layers if sources else tuple(sorted(wanted))
        # Of decoders only the rows of active features are read.
        plan = plan_stages(dictionaries, needed, decoder=False) if needed else None
        for dictionary in stages(dictionaries, plan) if plan is not None else ():
            row = residual_row(dictionary)
            if sources:
                with matrix_products(made):
                    active = active_features(dictionary, residuals[row], keep_reads=keep_reads)
                layers[dictionary.layer] = active
            for index, target in wanted.get(dictionary.layer, ()):
                found[index] = target_state(dictionary, target, residuals[row])
        strings = model.token_strings()
        return cls(
            model=model,
            prompt_id=prompt_id,
            batch=batch,
            tokens=tuple(strings[token] for token in batch.ids[0].tolist()),
            residuals=residuals,
            cache=cache,
            layers=layers,
            targets=tuple(found[index] for index in range(len(targets))),
            space=dictionaries.space,
            bytes_read=dictionaries.bytes_read - before,
        )


def residual_row(dictionary: SparseDictionary) -> int:
    """Return the row index of the residual that a dictionary reads and writes.

    Raises:
        DictionaryError: it is no autoencoder of the residual stream between blocks.
    """
    kind = dictionary.reads.kind
    if not dictionary.is_autoencoder or kind not in ("resid_post", "resid_pre"):
        raise DictionaryError(
            f"pathways follow the residual stream, but this dictionary reads {dictionary.reads}"
            + ("" if dictionary.is_autoencoder else f" and writes {dictionary.writes[0]}")
            + "; open autoencoders of resid_post"
        )
    return dictionary.layer + int(kind == "resid_post")


def active_features(
    dictionary: SparseDictionary,
    residual: Float[Tensor, "pos d_model"],
    *,
    keep_reads: bool = False,
) -> ActiveFeatures:
    """Encode every position and keep what is active, a slice of positions at a time."""
    step = max(1, _ENCODED_BYTES // (4 * dictionary.n_features))
    places: list[Tensor] = []
    values: list[Tensor] = []
    for first in range(0, residual.shape[0], step):
        dense = dictionary.encode(residual[first : first + step])
        position, feature = dense.nonzero(as_tuple=True)
        values.append(dense[position, feature].cpu())
        places.append(torch.stack([position + first, feature]).cpu())
    positions, ids = torch.cat(places, dim=1)
    unique, which = torch.unique(ids, return_inverse=True)
    return ActiveFeatures(
        layer=dictionary.layer,
        row=residual_row(dictionary),
        positions=positions.contiguous(),
        ids=ids.contiguous(),
        values=torch.cat(values),
        unique=unique,
        which=which,
        directions=_widened(dictionary.write_directions(unique)),
        reads=_widened(dictionary.read_rows(unique)) if keep_reads else None,
        written_bias=_widened(dictionary.decoder_bias),
    )


def target_state(
    dictionary: SparseDictionary, target: Target, residual: Float[Tensor, "pos d_model"]
) -> TargetState:
    """Read a target's row and its value at its position."""
    feature = target.feature.feature_id
    here = residual[target.position]
    pre = float(dictionary.pre_activations(here, [feature])[0])
    threshold = dictionary.gate.threshold(torch.tensor([feature]))
    if isinstance(threshold, Tensor):
        threshold = float(threshold[0])
    return TargetState(
        target=target,
        row=residual_row(dictionary),
        read=_widened(dictionary.read_rows([feature])[0]),
        bias=float(dictionary.read_bias([feature])[0]),
        pre_activation=pre,
        activation=float(dictionary.encode(here, [feature])[0]),
        margin=None if threshold is None else pre - threshold,
    )


def _run(
    model: LanguageModel, batch: TokenBatch
) -> tuple[Float[Tensor, "row pos d_model"], Cache | None]:
    sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers))]
    keep = Capability.CACHE in model.backend.capabilities
    result = model.run(batch, capture=sites, logits=None, keep_cache=keep)
    return torch.cat([result[site] for site in sites]), result.cache


def _placed(target: Target, length: int) -> Target:
    if not -length <= target.position < length:
        raise PromptError(
            f"target {target.feature} is wanted at position {target.position}, but the prompt has "
            f"{length} tokens"
        )
    return Target(target.feature, target.position % length)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
