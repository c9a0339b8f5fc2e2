"""Layer after layer through memory: what a step needs is there, what it had is gone.

A plan says beforehand how many bytes are held at most. While one layer is used the next one is
read; vectors stay. Every matrix is read once, whatever is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from layerscope.errors import DictionaryError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.library import DictionarySet
from layerscope.features.matrices import Matrix


@dataclass(frozen=True)
class StagingPlan:
    """In which order layers are held, and what that costs.

    Attributes:
        layers: in the order of use.
        encoder, decoder: which matrices a step needs whole; of the others rows are read.
        prefetch: whether the next layer is read while one is used.
        vector_bytes: bytes of all biases and thresholds, always held.
        layer_bytes: bytes of the matrices of each layer, in the order of use.
    """

    layers: tuple[int, ...]
    encoder: bool
    decoder: bool
    prefetch: bool
    vector_bytes: int
    layer_bytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once: vectors, a layer, and the next one where it is prefetched."""
        following = (*self.layer_bytes[1:], 0) if self.prefetch else (0,) * len(self.layers)
        pairs = zip(self.layer_bytes, following, strict=True)
        return self.vector_bytes + max((now + then for now, then in pairs), default=0)

    @property
    def total_bytes(self) -> int:
        """Bytes if every layer were held at once."""
        return self.vector_bytes + sum(self.layer_bytes)

    def line(self) -> str:
        """Return the plan in one line."""
        parts = [name for name in ("encoder", "decoder") if getattr(self, name)]
        ahead = ", the next layer read ahead" if self.prefetch else ""
        return (
            f"{len(self.layers)} layers one by one ({' and '.join(parts)}{ahead}): at most "
            f"{self.peak_bytes / 1e6:,.1f} MB of {self.total_bytes / 1e6:,.1f} MB in memory"
        )


def plan_stages(
    dictionaries: DictionarySet,
    layers: Sequence[int] | None = None,
    *,
    encoder: bool = True,
    decoder: bool = True,
    prefetch: bool = True,
) -> StagingPlan:
    """Return the plan of going through layers; nothing is read.

    Args:
        dictionaries: the set.
        layers: in the order of use (from the top down, say); None for all, ascending.
        encoder, decoder: which matrices are needed whole.
        prefetch: read the next layer while one is used.

    Raises:
        DictionaryError: a layer has no dictionary, or nothing is needed.
    """
    if not encoder and not decoder:
        raise DictionaryError("a step that needs neither encoder nor decoder needs no staging")
    chosen = tuple(dictionaries.layers if layers is None else layers)
    sizes = tuple(
        sum(matrix.nbytes for matrix in _needed(dictionaries[layer], encoder, decoder))
        for layer in chosen
    )
    vectors = sum(each.vector_bytes for each in dictionaries)
    return StagingPlan(chosen, encoder, decoder, prefetch, vectors, sizes)


def stages(dictionaries: DictionarySet, plan: StagingPlan) -> Iterator[SparseDictionary]:
    """Yield the dictionary of every layer with its matrices in memory; earlier ones are released.

    What the caller had loaded before stays loaded.

    Raises:
        DictionaryError: a file turns out to be damaged, when its layer is reached.
    """
    kept = {
        id(matrix)
        for layer in plan.layers
        for matrix in _needed(dictionaries[layer], plan.encoder, plan.decoder)
        if matrix.resident
    }

    def release(dictionary: SparseDictionary) -> None:
        for matrix in _needed(dictionary, True, True):
            if id(matrix) not in kept:
                matrix.release()

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead: Future[None] | None = None
        held: list[SparseDictionary] = []
        try:
            for place, layer in enumerate(plan.layers):
                dictionary = dictionaries[layer]
                if ahead is not None:
                    ahead.result()
                    ahead = None
                _load(dictionary, plan)
                held = [dictionary]
                following = plan.layers[place + 1 : place + 2]
                if plan.prefetch and following and following[0] != layer:
                    held.append(dictionaries[following[0]])
                    ahead = reader.submit(_load, held[-1], plan)
                yield dictionary
                if not following or following[0] != layer:
                    release(dictionary)
        finally:
            # Left early, by break or by an error: nothing stays behind.
            if ahead is not None:
                ahead.exception()
            for dictionary in held:
                release(dictionary)


def _load(dictionary: SparseDictionary, plan: StagingPlan) -> None:
    for matrix in _needed(dictionary, plan.encoder, plan.decoder):
        matrix.load()


def _needed(dictionary: SparseDictionary, encoder: bool, decoder: bool) -> list[Matrix]:
    found: list[Matrix] = [dictionary.encoder] if encoder else []
    return [*found, *dictionary.decoders] if decoder else found
