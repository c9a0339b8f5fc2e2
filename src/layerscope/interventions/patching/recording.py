"""A plain pass whose residuals, keys and values are stored, so that cells start from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import CapabilityError, PromptError
from layerscope.models import Edit, LanguageModel, Site, TokenBatch
from layerscope.models.backends.base import Cache
from layerscope.products import Products


@dataclass(frozen=True, eq=False)
class Recording:
    """What one pass over rows of one length left behind.

    Attributes:
        batch: the ids, without padding.
        residuals: what each block read, [row, pos, d_model] by block.
        final: what is unembedded at the last position, [row, d_model].
        cache: keys and values of all blocks; None where passes cannot be resumed at a position.
        no_cache: why there is none, else empty.
        activations: the other sites that were asked for.
        edits: what acted in the pass.
    """

    model: LanguageModel
    batch: TokenBatch
    residuals: tuple[Float[Tensor, "row pos d_model"], ...]
    final: Float[Tensor, "row d_model"]
    cache: Cache | None
    no_cache: str
    activations: Mapping[Site, Tensor]
    products: Products
    edits: tuple[Edit, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.batch)

    @property
    def n_columns(self) -> int:
        """Length of the rows in tokens."""
        return self.batch.width

    def value(self, site: Site) -> Tensor:
        """Return what a site held, [row, pos, ...]; positions come first in ``scores``, too."""
        if site.kind == "resid_pre":
            assert site.layer is not None
            return self.residuals[site.layer]
        if site.kind == "resid_post" and site not in self.activations:
            assert site.layer is not None
            return self.residuals[site.layer + 1]
        return self.activations[site].movedim(site.pos_axis, 1)


def record(
    model: LanguageModel,
    ids: Int[Tensor, "row pos"] | TokenBatch,
    *,
    capture: str | Sequence[str | Site] = (),
    edits: Sequence[Edit] = (),
    products: Products = "default",
) -> Recording:
    """Run rows of one length once and keep what sweeps over them start from.

    Args:
        ids: real tokens only; rows of different lengths are recorded apart.
        capture: other sites to keep, for donors.
        edits: what makes the rows what they are (noise on the embeddings, say).

    Raises:
        PromptError: rows of different lengths.
    """
    batch = ids if isinstance(ids, TokenBatch) else TokenBatch.from_ids(ids.tolist())
    if len(set(batch.lengths)) > 1:
        raise PromptError(
            f"a recording needs rows of one length, got {sorted(set(batch.lengths))} tokens; "
            "record them apart"
        )
    names = [capture] if isinstance(capture, str) else capture
    wanted = [site for site in names if not str(site).startswith("resid_pre")]
    sites = ["resid_pre.*", "final_norm", *wanted]

    def attempt(keep: bool) -> Recording:
        result = model.run(
            batch, capture=sites, edits=edits, logits=None, products=products, keep_cache=keep
        )
        others = {
            site: value
            for site, value in result.activations.items()
            if site.kind not in ("resid_pre", "final_norm")
        }
        return Recording(
            model,
            batch,
            tuple(result[f"resid_pre.{layer}"] for layer in range(model.n_layers)),
            result["final_norm"][:, -1].clone(),
            result.cache,
            "",
            others,
            products,
            tuple(edits),
        )

    try:
        return attempt(True)
    except CapabilityError as error:
        reason = str(error)
    return replace(attempt(False), no_cache=reason)
