"""Feature edits: only the difference is written, so everything else of the stream stays.

An edit of feature u at value v adds ``(v - f_u) d_u`` to the activation, f_u being the value the
feature has there and d_u its write direction. What the dictionary does not explain is untouched,
and v = f_u leaves every bit as it was. Encode, change, decode is not offered: it would put the
dictionary's error into the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError, EditError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.spaces import FeatureId
from layerscope.models.edits import Edit, EditContext, Positions
from layerscope.models.scopes import Scope
from layerscope.models.sites import Site

Features = int | FeatureId | Sequence[int] | Sequence[FeatureId] | Tensor
Value = float | Tensor


@dataclass(frozen=True, eq=False)
class FeatureEdit(Edit):
    """Base of the edits of some features of one dictionary; make one with a function below.

    Attributes:
        dictionary: an autoencoder of the site (a transcoder's features are not in the stream that
            it reads).
        features: indices into it.
    """

    _: KW_ONLY
    dictionary: SparseDictionary
    features: tuple[int, ...]

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless the dictionary fits the selected values."""
        width = shape[-1] if shape[-1] == self.dictionary.d_in else shape[-1] * shape[-2]
        if width != self.dictionary.d_in:
            raise EditError(
                f"{type(self).__name__} at '{self.site}': the dictionary reads width "
                f"{self.dictionary.d_in}, the site has {shape[-1]}"
            )

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return ``h + (v - f) d``; rows where no feature changes are returned as they are."""
        flat = values if values.shape[-1] == self.dictionary.d_in else values.flatten(-2)
        found = self.dictionary.encode(flat, self.features)
        change = self.target(found) - found
        moved = flat + self.dictionary.write(flat, change, self.features)
        # Adding zero would turn -0.0 into 0.0, and widen: an edit without effect changes no bit.
        still = (change == 0).all(dim=-1, keepdim=True)
        edited = torch.where(still, flat.to(moved.dtype), moved)
        return edited.view(values.shape)

    def target(self, found: Float[Tensor, "row pos k"]) -> Float[Tensor, "row pos k"]:
        """Return the values that the features shall have."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return a JSON-able account of the edit."""
        account = super().describe()
        account["dictionary"] = self.dictionary.space.name
        account["features"] = list(self.features)
        return account


@dataclass(frozen=True, eq=False)
class SetFeatures(FeatureEdit):
    """Give features a value: a number, or [k], [pos, k], [row, pos, k] over the selection."""

    value: Value

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless the value fits the selection."""
        super().check(shape)
        _check_value(self, self.value, (shape[0], shape[1], len(self.features)))

    def target(self, found: Float[Tensor, "row pos k"]) -> Float[Tensor, "row pos k"]:
        """Return the value, broadcast."""
        if isinstance(self.value, Tensor):
            return self.value.to(found.device, found.dtype).expand_as(found)
        return torch.full_like(found, self.value)


@dataclass(frozen=True, eq=False)
class ScaleFeatures(FeatureEdit):
    """Multiply features by a factor, a number or a tensor as in `SetFeatures`."""

    factor: Value

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless the factor fits the selection."""
        super().check(shape)
        _check_value(self, self.factor, (shape[0], shape[1], len(self.features)))

    def target(self, found: Float[Tensor, "row pos k"]) -> Float[Tensor, "row pos k"]:
        """Return the product."""
        if isinstance(self.factor, Tensor):
            return found * self.factor.to(found.device, found.dtype)
        return found * self.factor


@dataclass(frozen=True, eq=False)
class ClampFeatures(FeatureEdit):
    """Keep features between bounds; None for no bound."""

    minimum: float | None = None
    maximum: float | None = None

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless there is a bound, and the lower one is the lower."""
        super().check(shape)
        low, high = self.minimum, self.maximum
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise EditError(
                f"ClampFeatures at '{self.site}' has the range {low} to {high}; give a minimum, a "
                "maximum above it, or both"
            )

    def target(self, found: Float[Tensor, "row pos k"]) -> Float[Tensor, "row pos k"]:
        """Return the clamped values."""
        return found.clamp(self.minimum, self.maximum)


def set_features(
    dictionary: SparseDictionary,
    features: Features,
    value: Value,
    *,
    rows: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    scope: Scope | str | None = None,
) -> SetFeatures:
    """Return the edit that gives features a value: what they have in another prompt, say.

    Args:
        dictionary: an autoencoder.
        features: indices, or typed ids, which must belong to the dictionary.
        value: a number, or a tensor [k], [pos, k] or [row, pos, k]; [row, 1, k] gives every batch
            row its own values, in generation too.
        rows, positions, scope: which tokens, as in every edit.

    Raises:
        DictionaryError: a feature belongs to another space, or the dictionary is a transcoder.
    """
    site, ids = _of(dictionary, features)
    return SetFeatures(
        site, rows=rows, positions=positions, scope=scope, dictionary=dictionary, features=ids,
        value=value,
    )  # fmt: skip


def scale_features(
    dictionary: SparseDictionary,
    features: Features,
    factor: Value,
    *,
    rows: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    scope: Scope | str | None = None,
) -> ScaleFeatures:
    """Return the edit that multiplies features by a factor; arguments as in `set_features`."""
    site, ids = _of(dictionary, features)
    return ScaleFeatures(
        site, rows=rows, positions=positions, scope=scope, dictionary=dictionary, features=ids,
        factor=factor,
    )  # fmt: skip


def ablate_features(
    dictionary: SparseDictionary,
    features: Features,
    *,
    rows: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    scope: Scope | str | None = None,
) -> SetFeatures:
    """Return the edit that sets features to zero; arguments as in `set_features`."""
    return set_features(dictionary, features, 0.0, rows=rows, positions=positions, scope=scope)


def clamp_features(
    dictionary: SparseDictionary,
    features: Features,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    rows: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    scope: Scope | str | None = None,
) -> ClampFeatures:
    """Return the edit that keeps features between bounds; arguments as in `set_features`."""
    site, ids = _of(dictionary, features)
    return ClampFeatures(
        site, rows=rows, positions=positions, scope=scope, dictionary=dictionary, features=ids,
        minimum=minimum, maximum=maximum,
    )  # fmt: skip


def _of(dictionary: SparseDictionary, features: Features) -> tuple[Site, tuple[int, ...]]:
    if not dictionary.is_autoencoder:
        raise DictionaryError(
            f"features of a transcoder ({dictionary.reads} to {dictionary.writes[0]}) cannot be "
            "edited at the site it reads; add its write directions with `Add` at the site it writes"
        )
    if isinstance(features, Tensor):
        features = features.reshape(-1).tolist()
    listed: list[Any] = [features] if isinstance(features, int | FeatureId) else list(features)
    ids: list[int] = []
    for each in listed:
        if isinstance(each, FeatureId):
            dictionary.space.require([each])
            ids.append(each.feature_id)
        else:
            ids.append(dictionary.id(int(each)).feature_id)
    if not ids or len(set(ids)) != len(ids):
        raise EditError("a feature edit needs features, each named once")
    return dictionary.reads, tuple(ids)


def _check_value(edit: FeatureEdit, value: Value, selected: tuple[int, int, int]) -> None:
    if not isinstance(value, Tensor):
        return
    given = tuple(value.shape)
    fits = 1 <= len(given) <= 3 and all(
        size in (wanted, 1) for size, wanted in zip(given[::-1], selected[::-1], strict=False)
    )
    if not fits or not value.is_floating_point():
        row, pos, k = selected
        raise EditError(
            f"{type(edit).__name__} at '{edit.site}' has a value of shape {list(given)}; it needs "
            f"floats of shape [{k}], [{pos}, {k}] or [{row}, {pos}, {k}]"
        )
