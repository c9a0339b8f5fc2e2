"""Dictionaries on the Hugging Face hub: only the files that are asked for are downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from layerscope.errors import DictionaryError

_ID = re.compile(
    r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<sub>.+))?"
)


def fetch(
    source: str | Path, *, format: str | None = None, layers: Sequence[int] | None = None
) -> Path:
    """Return the local folder or file of a source, downloading what is not there yet.

    Args:
        source: a local path, or ``[hf://]owner/repository[@revision][/folder]``.
        format: its format, which says which files are needed.
        layers: files whose path names another layer are left out.

    Raises:
        DictionaryError: there is neither such a path nor such a repository, or the hub cannot be
            reached.
    """
    path = Path(source)
    if path.exists():
        return path
    text = str(source)
    match = _ID.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")):
        raise DictionaryError(f"there is no {source}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, revision, sub = match["repo"], match["revision"], match["sub"]
    patterns = _patterns(format)
    try:
        if sub or layers:
            names = HfApi().list_repo_files(repo, revision=revision)
            patterns = _wanted(names, patterns, sub, layers)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DictionaryError(f"{repo} cannot be had from the hub: {reason}") from error
    found = folder / sub if sub else folder
    if not found.exists():
        raise DictionaryError(f"{repo} has no {sub}")
    return found


def _patterns(format: str | None) -> list[str]:
    from layerscope.features.formats.registry import FORMATS, format_of

    chosen = FORMATS if format is None else (format_of(format),)
    return sorted({pattern for each in chosen for pattern in each.patterns})


def _wanted(
    names: Sequence[str], patterns: Sequence[str], sub: str | None, layers: Sequence[int] | None
) -> list[str]:
    from fnmatch import fnmatch

    from layerscope.features.formats.base import layer_in

    found: list[str] = []
    for name in names:
        inside = sub is None or name == sub or name.startswith(f"{sub}/")
        layer = layer_in(name)
        asked = layers is None or layer is None or layer in layers
        if inside and asked and any(fnmatch(name, pattern) for pattern in patterns):
            found.append(name)
    return found
