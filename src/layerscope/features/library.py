"""Opening dictionaries: one, or the set of a model's layers, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layerscope.errors import DictionaryError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.formats.base import Found, LoadOptions, with_hooks
from layerscope.features.formats.registry import detect, format_of
from layerscope.features.hub import fetch
from layerscope.features.spaces import FeatureSpace


class DictionarySet:
    """Dictionaries of one feature space by layer; headers and vectors are read, matrices not yet.

    Attributes:
        name: of the set.
        space: the feature space of all its layers.
    """

    def __init__(self, name: str, dictionaries: Sequence[SparseDictionary]) -> None:
        if not dictionaries:
            raise DictionaryError(f"{name} holds no dictionary")
        kinds = {each.reads.kind for each in dictionaries}
        if len(kinds) > 1:
            raise DictionaryError(
                f"{name} mixes dictionaries of {', '.join(sorted(kinds))}; open one kind by its "
                "folder"
            )
        self._by_layer = {each.layer: each for each in dictionaries}
        if len(self._by_layer) < len(dictionaries):
            raise DictionaryError(
                f"{name} holds several dictionaries of one layer (other widths or sparsities?); "
                "open one by its folder"
            )
        self.name = name
        sizes = sorted((each.layer, each.n_features) for each in dictionaries)
        self.space = FeatureSpace(f"{name}:{kinds.pop()}", tuple(sizes))
        for each in dictionaries:
            each.space = self.space

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a dictionary, ascending."""
        return self.space.layers

    def __getitem__(self, layer: int) -> SparseDictionary:
        """Return the dictionary of a layer; raises DictionaryError if it has none."""
        if layer not in self._by_layer:
            raise DictionaryError(
                f"{self.name} has no dictionary of layer {layer}; it has "
                f"{', '.join(map(str, self.layers))}"
            )
        return self._by_layer[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._by_layer

    def __iter__(self) -> Iterator[SparseDictionary]:
        return (self._by_layer[layer] for layer in self.layers)

    def __len__(self) -> int:
        return len(self._by_layer)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all layers in memory now."""
        return sum(each.resident_bytes for each in self)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return sum(each.bytes_read for each in self)

    def load(self) -> DictionarySet:
        """Read every layer into memory and return this set."""
        for each in self:
            each.load()
        return self


def open_set(
    source: str | Path,
    *,
    layers: Sequence[int] | None = None,
    format: str | None = None,
    name: str | None = None,
    **options: Any,
) -> DictionarySet:
    """Open the dictionaries of a folder or hub repository; matrices stay on the disk.

    Args:
        source: a folder, a file, or ``owner/repository[/folder]`` on the hub.
        layers: only these.
        format: code or name of the format; None finds out.
        name: of the feature space; by default the folder's.
        **options: fields of `LoadOptions`.

    Raises:
        DictionaryError: nothing is found, something is damaged, or several dictionaries claim one
            layer.
    """
    root = fetch(source, format=format, layers=layers)
    found = detect(root, format=format)
    if layers is not None:
        found = [each for each in found if each.layer in set(layers)]
        missing = sorted(set(layers) - {each.layer for each in found if each.layer is not None})
        if missing:
            raise DictionaryError(f"{source} has no dictionary of layer {missing[0]}")
    wanted = _options(options)
    read = [_read(each, wanted) for each in found]
    return DictionarySet(name or _name(source), read)


def load(
    source: str | Path,
    layer: int | None = None,
    *,
    format: str | None = None,
    name: str | None = None,
    resident: bool = True,
    **options: Any,
) -> SparseDictionary:
    """Load one dictionary.

    Args:
        source: as in `open_set`.
        layer: which, where there are several.
        format: code or name of the format; None finds out.
        name: of the feature space; by default the folder's.
        resident: read the matrices now; False leaves them in the file, to be read by row.
        **options: fields of `LoadOptions`: hook, activation_scale, dtype, device, k, ...

    Raises:
        DictionaryError: nothing is found, it is ambiguous, or the file is damaged.
    """
    root = fetch(source, format=format, layers=None if layer is None else [layer])
    found = detect(root, format=format)
    if layer is not None:
        found = [each for each in found if each.layer == layer]
    if len(found) != 1:
        have = ", ".join(f"{each.label} (layer {each.layer})" for each in found[:6])
        which = "" if layer is None else f" of layer {layer}"
        raise DictionaryError(
            f"{source} holds {len(found)} dictionaries{which}"
            + (f": {have}; name a layer or the folder of one" if found else "")
        )
    dictionary = _read(found[0], _options(options))
    made = DictionarySet(name or _name(source), [dictionary])[dictionary.layer]
    return made.load() if resident else made


def _read(found: Found, options: LoadOptions) -> SparseDictionary:
    raw = format_of(found.format).read(found, options)
    dictionary = with_hooks(raw, options, found.path).fold()
    dictionary.facts["path"] = str(found.path)
    return dictionary


def _options(options: dict[str, Any]) -> LoadOptions:
    try:
        return LoadOptions(**options)
    except TypeError as error:
        raise DictionaryError(f"unknown option: {error}") from None


def _name(source: str | Path) -> str:
    path = Path(source)
    if path.is_file():
        path = path.parent
    return path.resolve().name if path.exists() else str(source).strip("/")
