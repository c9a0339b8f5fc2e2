"""Which feature is meant: ids that carry their dictionary, and joins that notice another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from layerscope.errors import DictionaryError

KEYS = ("space", "layer", "feature_id")


@dataclass(frozen=True, order=True)
class FeatureId:
    """One feature of one dictionary.

    Attributes:
        space: name of the `FeatureSpace`.
        layer: block, counted from 0.
        feature_id: index of the feature in the dictionary of that layer.
    """

    space: str
    layer: int
    feature_id: int

    def __str__(self) -> str:
        return f"{self.space}/{self.layer}/{self.feature_id}"

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Read what `str` wrote.

        Raises:
            DictionaryError: the text is no feature id.
        """
        space, _, rest = text.rpartition("/")
        space, _, layer = space.rpartition("/")
        if not space or not layer.isdecimal() or not rest.isdecimal():
            raise DictionaryError(f"'{text}' is no feature id; write SPACE/LAYER/FEATURE")
        return cls(space, int(layer), int(rest))


@dataclass(frozen=True)
class FeatureSpace:
    """The features of one set of dictionaries: which layers there are, and how many each has.

    Attributes:
        name: of the set and the kind of site it reads, such as ``my-set:resid_post``.
        sizes: (layer, number of features) of every layer, ascending.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a dictionary."""
        return tuple(layer for layer, _ in self.sizes)

    def id(self, layer: int, feature_id: int) -> FeatureId:
        """Return the id of one feature.

        Raises:
            DictionaryError: the layer has no dictionary, or its dictionary no such feature.
        """
        size = dict(self.sizes).get(layer)
        if size is None:
            raise DictionaryError(
                f"{self.name} has no dictionary of layer {layer}; it has "
                f"{', '.join(map(str, self.layers)) or 'none'}"
            )
        if not 0 <= feature_id < size:
            raise DictionaryError(
                f"layer {layer} of {self.name} has features 0 to {size - 1}, not {feature_id}"
            )
        return FeatureId(self.name, layer, feature_id)

    def require(self, ids: Iterable[FeatureId]) -> None:
        """Check that ids are features of this space.

        Raises:
            DictionaryError: one belongs to another space, or does not exist.
        """
        for each in ids:
            if each.space != self.name:
                raise DictionaryError(
                    f"feature {each} belongs to the space '{each.space}', not to '{self.name}'; "
                    "ids of two dictionaries have nothing in common"
                )
            self.id(each.layer, each.feature_id)


def residual_coordinates(d_model: int, n_layers: int) -> FeatureSpace:
    """Return the space of the residual stream's own coordinates, which are no features."""
    return FeatureSpace(
        "residual-coordinates", tuple((layer, d_model) for layer in range(n_layers))
    )


def join(
    left: pl.DataFrame, right: pl.DataFrame, *, on: Sequence[str] = KEYS, how: str = "inner"
) -> pl.DataFrame:
    """Join two tables of features by their typed ids.

    Raises:
        DictionaryError: a table lacks one of the three key columns, or the tables speak of
            different feature spaces.
    """
    for name, table in (("left", left), ("right", right)):
        missing = [key for key in KEYS if key not in table.columns or key not in on]
        if missing:
            raise DictionaryError(
                f"the {name} table cannot be joined by feature: {', '.join(missing)} is missing; "
                f"features are joined on {', '.join(KEYS)}"
            )
    spaces = [set(table["space"].unique().to_list()) for table in (left, right)]
    if spaces[0] and spaces[1] and spaces[0] != spaces[1]:
        raise DictionaryError(
            f"cannot join features of {_names(spaces[0])} with features of {_names(spaces[1])}: "
            "the same number means another feature there"
        )
    return left.join(right, on=list(on), how=how)  # pyright: ignore[reportArgumentType]


def _names(spaces: set[str]) -> str:
    return " and ".join(f"'{space}'" for space in sorted(spaces))
