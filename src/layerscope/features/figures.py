"""How well a dictionary describes activations: FVU, L0, dead features, loss recovered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.dictionary import SparseDictionary
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import Apply, EditContext
from layerscope.models.language_model import LanguageModel
from layerscope.models.run import Capture
from layerscope.models.sites import Site

_CHUNK = 4096


@dataclass(frozen=True)
class Figures:
    """What a dictionary does on some activations.

    Attributes:
        rows: activations looked at.
        fvu: share of the variance that is not explained; 0 is perfect, 1 as good as the mean.
        l0: features active per token.
        dead: share of features that were active nowhere.
        norm_ratio: mean norm of reconstructions over that of activations.
        cosine: mean cosine of reconstruction and activation.
    """

    rows: int
    fvu: float
    l0: float
    dead: float
    norm_ratio: float
    cosine: float

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


class Tally:
    """Sums of a dictionary's figures over chunks of activations, in float64."""

    def __init__(self, d_out: int, n_features: int) -> None:
        self.rows = 0
        self._sum = torch.zeros(d_out, dtype=torch.float64)
        self._squares = 0.0
        self._errors = 0.0
        self._active = 0
        self._norm_out = 0.0
        self._norm_in = 0.0
        self._cosines = 0.0
        self.counts = torch.zeros(n_features, dtype=torch.int64)

    def add(
        self,
        target: Float[Tensor, "row d_out"],
        written: Float[Tensor, "row d_out"],
        features: Float[Tensor, "row n"],
    ) -> None:
        """Count activations, what was reconstructed of them, and the features that did it."""
        y, made = target.double().cpu(), written.double().cpu()
        self.rows += len(y)
        self._sum += y.sum(dim=0)
        self._squares += float(y.square().sum())
        self._errors += float((y - made).square().sum())
        active = features > 0
        self._active += int(active.sum())
        self.counts += active.sum(dim=0).cpu()
        norms = y.norm(dim=1), made.norm(dim=1)
        self._norm_in += float(norms[0].sum())
        self._norm_out += float(norms[1].sum())
        products = (norms[0] * norms[1]).clamp_min(1e-30)
        self._cosines += float(((y * made).sum(dim=1) / products).sum())

    def figures(self) -> Figures:
        """Return the figures of everything added; raises DictionaryError if that is nothing."""
        if not self.rows:
            raise DictionaryError("there are no activations to judge a dictionary by")
        variance = self._squares - float(self._sum.square().sum()) / self.rows
        return Figures(
            rows=self.rows,
            fvu=self._errors / max(variance, 1e-30),
            l0=self._active / self.rows,
            dead=float((self.counts == 0).double().mean()),
            norm_ratio=self._norm_out / max(self._norm_in, 1e-30),
            cosine=self._cosines / self.rows,
        )


@torch.no_grad()
def measure(
    dictionary: SparseDictionary,
    x: Float[Tensor, "*rows d_in"],
    target: Float[Tensor, "*rows d_out"] | None = None,
) -> Figures:
    """Return the figures of a dictionary on raw activations.

    Args:
        dictionary: any.
        x: activations of the site it reads.
        target: activations of the site it writes; None for an autoencoder, whose target is x.

    Raises:
        DictionaryError: there are no activations, or a transcoder has no target.
    """
    return tally(dictionary, x, target).figures()


@torch.no_grad()
def tally(dictionary: SparseDictionary, x: Tensor, target: Tensor | None = None) -> Tally:
    """Return the sums behind `measure`, with the count of every feature."""
    if target is None and not dictionary.is_autoencoder:
        raise DictionaryError(
            f"a transcoder is judged by {dictionary.writes[0]}: give its activations as target"
        )
    x = x.reshape(-1, dictionary.d_in)
    y = x if target is None else target.reshape(-1, dictionary.d_out)
    found = Tally(dictionary.d_out, dictionary.n_features)
    for first in range(0, len(x), _CHUNK):
        part = x[first : first + _CHUNK]
        features = dictionary.encode(part)
        found.add(y[first : first + _CHUNK], dictionary.decode(features, x=part), features)
    return found


@torch.no_grad()
def collect(
    model: LanguageModel,
    batches: Iterable[TokenBatch],
    sites: Sequence[Site],
    *,
    skip: int = 1,
    dtype: torch.dtype | None = torch.float32,
) -> dict[Site, Float[Tensor, "row width"]]:
    """Return the activations of sites at all real tokens, heads flattened, on the CPU.

    Args:
        model: the model.
        batches: padded ids.
        sites: where.
        skip: first positions of every row to leave out (a BOS is like no other token).
        dtype: of the result.
    """
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    last = max((site.layer for site in sites if site.layer is not None), default=None)
    for batch in batches:
        wanted = mask_of(batch, skip)
        capture = Capture([str(site) for site in sites], device="cpu", dtype=dtype)
        result = model.run(batch, capture=capture, logits=None, stop_after=last)
        for site in sites:
            parts[site].append(result[site][wanted].flatten(1))
    return {site: torch.cat(found) for site, found in parts.items()}


def mask_of(batch: TokenBatch, skip: int) -> Tensor:
    """Return which padded columns hold tokens after the first `skip` of their row."""
    place = batch.attention_mask.long().cumsum(dim=1)
    return batch.attention_mask & (place > skip)


@torch.no_grad()
def loss_recovered(
    model: LanguageModel,
    dictionary: SparseDictionary,
    batches: Iterable[TokenBatch],
    *,
    skip: int = 1,
) -> dict[str, float]:
    """Return what reconstruction costs the model: next-token loss in nats, and the share kept.

    The site that the dictionary writes is replaced at all tokens after the first `skip`: by the
    reconstruction, and by zero. ``recovered`` is (zero - reconstructed) / (zero - clean).

    Raises:
        DictionaryError: the dictionary writes several sites.
    """
    if len(dictionary.writes) != 1:
        raise DictionaryError("loss recovered is measured for dictionaries that write one site")
    reads, writes = dictionary.reads, dictionary.writes[0]
    names = ("clean", "reconstructed", "zero")
    losses = dict.fromkeys(names, 0.0)
    count = 0
    for batch in batches:
        real = mask_of(batch, skip)

        read: dict[str, Tensor] = {}

        def keep(values: Tensor, context: EditContext, read: dict[str, Tensor] = read) -> Tensor:
            read["x"] = values
            return values

        def put(
            values: Tensor,
            context: EditContext,
            real: Tensor = real,
            read: dict[str, Tensor] = read,
        ) -> Tensor:
            made = dictionary.reconstruct(read.get("x", values)).to(values.dtype)
            return torch.where(_on(real, values), made, values)

        def zero(values: Tensor, context: EditContext, real: Tensor = real) -> Tensor:
            return torch.where(_on(real, values), torch.zeros_like(values), values)

        edits = {"clean": [], "reconstructed": [Apply(writes, put)], "zero": [Apply(writes, zero)]}
        if reads != writes:
            edits["reconstructed"].insert(0, Apply(reads, keep))
        following = mask_of(batch, skip)[:, 1:] & mask_of(batch, skip)[:, :-1]
        targets = batch.ids[:, 1:][following]
        for name in names:
            logits = model.run(batch, edits=edits[name]).logits
            assert logits is not None
            rows = logits[:, :-1][following.to(logits.device)].float()
            loss = torch.nn.functional.cross_entropy(rows, targets.to(rows.device), reduction="sum")
            losses[name] += float(loss)
        count += int(following.sum())
    if not count:
        raise DictionaryError("there are no tokens to measure a loss on")
    found = {name: loss / count for name, loss in losses.items()}
    gap = found["zero"] - found["clean"]
    found["recovered"] = (found["zero"] - found["reconstructed"]) / gap if gap else float("nan")
    return found


def _on(mask: Tensor, values: Tensor) -> Tensor:
    return mask.to(values.device).view(*mask.shape, *([1] * (values.ndim - 2)))
