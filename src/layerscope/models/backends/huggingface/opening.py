"""Load a Hugging Face model, find its structure, and prove what its sites claim."""

from __future__ import annotations

from typing import Any

from layerscope.errors import IdentityError, ModelError
from layerscope.models import identities
from layerscope.models.backends.huggingface.backend import HuggingFaceBackend
from layerscope.models.backends.huggingface.loading import LoadedModel, load_pretrained
from layerscope.models.backends.huggingface.structure import is_listed, structures, why_unreadable
from layerscope.models.identities import IdentityReport


def open_model(
    source: Any, *, verify: bool = True, **options: Any
) -> tuple[HuggingFaceBackend, LoadedModel, IdentityReport | None]:
    """Load as `load_pretrained` does, and take the structure whose identities hold.

    Raises:
        IdentityError: no structure that the model may have passes; says which identity fails.
        ModelError: the model cannot be loaded or run.
    """
    loaded = load_pretrained(source, **options)
    backend, report = _proved(loaded, verify=verify)
    return backend, loaded, report


def _proved(
    loaded: LoadedModel, *, verify: bool
) -> tuple[HuggingFaceBackend, IdentityReport | None]:
    """Return the backend whose structure passes the identities."""
    listed = is_listed(loaded.model)
    failures: list[ModelError] = []
    for structure in structures(loaded.model):
        backend = HuggingFaceBackend(loaded.model, structure)
        if listed and not verify:
            return backend, None
        try:
            # What passes several streams on cannot begin in the middle with one of them.
            thorough = not listed and structure.row.stream is None
            report = identities.check(backend, thorough=thorough)
            report.require(loaded.name)
        except ModelError as error:
            failures.append(error)
        # Foreign code runs here for the first time; whatever it raises means one thing.
        except Exception as error:
            line = " ".join(str(error).split())
            kind = type(error).__name__
            failure = ModelError(f"{loaded.name} cannot be run: {kind}: {line}")
            failure.__cause__ = error
            failures.append(failure)
        else:
            return backend, report
    if listed:
        raise failures[0]
    known = why_unreadable(loaded.model)
    if known is not None:
        raise IdentityError(
            f"{loaded.name} is not a model that layerscope can read: it {known} ({failures[0]})"
        )
    kind = loaded.model.config.model_type
    raise IdentityError(
        f"model type '{kind}' is not in the family table and no known layout fits it: "
        f"{failures[0] if failures else 'its blocks are unlike any'}"
    )
