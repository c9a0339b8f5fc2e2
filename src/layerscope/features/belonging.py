"""Whether a dictionary and a model belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerscope.errors import CapabilityError, DictionaryError, SiteError
from layerscope.models.language_model import LanguageModel
from layerscope.models.sites import Site

if TYPE_CHECKING:
    from layerscope.features.dictionary import SparseDictionary


def require_model(
    dictionary: SparseDictionary, model: LanguageModel, *, other_model: bool = False
) -> None:
    """Check sites, widths and name; see `SparseDictionary.require_model`."""
    made_for = dictionary.facts.get("model_name")
    if isinstance(made_for, str) and made_for and not other_model and not _same(made_for, model):
        raise DictionaryError(
            f"this dictionary was made for {made_for}, the model is {model.name}; load that model, "
            "or say that another one is meant (other_model)"
        )
    for site, width in (
        (dictionary.reads, dictionary.d_in),
        *((site, dictionary.d_out) for site in dictionary.writes),
    ):
        found = site_width(model, site)
        if found is not None and found != width:
            raise DictionaryError(
                f"the dictionary has width {width} at {site}, {model.name} has {found}: it belongs "
                "to another model or site"
            )


def site_width(model: LanguageModel, site: Site) -> int | None:
    """Return the width of a site with its heads flattened; None where the backend cannot say.

    Raises:
        DictionaryError: the model has no such site; says why.
    """
    try:
        resolved = site.resolve(model.n_layers, model.n_heads, model.n_kv_heads)
        reason = model.backend.why_not(resolved)
        if reason is not None:
            raise CapabilityError(reason)
        trailing = model.backend.trailing(resolved, 1)
    except (SiteError, CapabilityError) as error:
        raise DictionaryError(
            f"{model.name} does not have the dictionary's site: {error}"
        ) from None
    width = 1
    for size in trailing:
        width *= size
    return width


def _same(made_for: str, model: LanguageModel) -> bool:
    """Compare names without owner and case; ids of one model differ in their owner only."""
    found: Any = model.provenance().get("id")
    names = {model.name, str(found)}
    return made_for.rsplit("/", 1)[-1].lower() in {n.rsplit("/", 1)[-1].lower() for n in names}
