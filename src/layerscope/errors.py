"""Every error layerscope raises on purpose.

Each message is one line that says what is wrong and what to do about it. The command line prints
that line and exits with code 2; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerscopeError(Exception):
    """Base of all errors that a user can cause or repair."""


class ConfigError(LayerscopeError):
    """An option or a configuration value is not usable."""


class ModelError(LayerscopeError):
    """A model or its tokenizer cannot be loaded or used."""


class IdentityError(ModelError):
    """A model failed one of the identities that make its sites trustworthy."""


class CapabilityError(ModelError):
    """What was asked for is beyond this backend or model."""


class SiteError(LayerscopeError):
    """A site name is unknown, or names a layer or head that the model does not have."""


class EditError(LayerscopeError):
    """An edit cannot be applied: wrong shape, site, position or batch row."""


class PromptError(LayerscopeError):
    """A prompt is empty, too long or malformed."""


class AlignmentError(PromptError):
    """An answer cannot be aligned with the tokens that follow its prompt."""


class LensError(LayerscopeError):
    """A lens is unknown, or does not fit the model."""


class DictionaryError(LayerscopeError):
    """A sparse dictionary cannot be read, does not fit the model, or is used against its nature."""


class TableError(LayerscopeError):
    """A table lacks columns, or holds values that its schema forbids."""


class StoreError(LayerscopeError):
    """The runs database or one of its artifacts cannot be read or written."""


class OutputError(LayerscopeError):
    """An output file or folder cannot be written."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the nearest known names, or ``""``."""
    matches = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    if not matches:
        return ""
    return "; did you mean " + " or ".join(repr(match) for match in matches) + "?"
