"""Find out how large a model is by folder, hub id or name, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.files import (
    CONFIG_FILE,
    ModelFolder,
    check_safetensors,
    refuse_other_formats,
)
from layerscope.models.backends.huggingface.loading import read_config
from layerscope.models.backends.huggingface.sizes import read_sizes
from layerscope.models.backends.huggingface.weights import Entry, read_headers
from layerscope.models.memory.sizes import Sizes, from_name


def find_sizes(source: str, *, revision: str | None = None) -> Sizes:
    """Return the sizes of a model from its configuration and the headers of its weight files.

    A hub id is looked up in the cache, then on the hub, from where only config.json and the headers
    are fetched; where neither answers, its name is read.

    Raises:
        ModelError: the folder is not there or not a causal language model, or a name says no size.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(ModelFolder(path, path.resolve().name, source, "folder", None))
    if path.exists() or source[:1] in ("/", ".", "~") or source.count("/") > 1:
        raise ModelError(f"there is no folder {source}: check the path")
    found = _of_hub(source, revision)
    if found is not None:
        return found
    named = from_name(source)
    if named is None:
        raise ModelError(
            f"{source} is neither a folder here nor a model that the hub or its cache knows, and "
            "its name says no number of parameters: give a local folder, or connect"
        )
    return named


def _of_folder(folder: ModelFolder) -> Sizes:
    refuse_other_formats(folder)
    if not (folder.path / CONFIG_FILE).is_file():
        raise ModelError(f"{folder.source} is not a model folder: it has no {CONFIG_FILE}")
    files = folder.weight_files
    entries: Mapping[str, Entry] = {}
    if files and all(file.is_file() for file in files):
        for file in files:
            check_safetensors(file)
        entries = read_headers(files)
    return _known(folder, entries)


def _known(folder: ModelFolder, entries: Mapping[str, Entry]) -> Sizes:
    sizes = read_sizes(folder.source, read_config(folder), entries)
    if not sizes.parameters:
        raise ModelError(
            f"{folder.source}: its configuration cannot be built, and it has no weights"
        )
    return sizes


def _of_hub(repo: str, revision: str | None) -> Sizes | None:
    """Return the sizes of a hub model: cached, else fetched; None when neither knows it."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = try_to_load_from_cache(repo, CONFIG_FILE, revision=revision)
        if isinstance(cached, str):
            path = Path(cached).parent
            if any(path.glob("*.safetensors")):
                return _of_folder(ModelFolder(path, repo, repo, "hub", path.name))
        if not isinstance(cached, str) and not _reachable():
            return None
        path = Path(hf_hub_download(repo, CONFIG_FILE, revision=revision)).parent
        folder = ModelFolder(path, repo, repo, "hub", path.name)
        try:
            entries = _fetched(get_safetensors_metadata(repo, revision=revision))
        # No safetensors there, or no answer: the configuration says enough.
        except Exception:
            entries = {}
        return _known(folder, entries)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None


def _reachable() -> bool:
    """Ask the hub once: its own client asks six times, which takes half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    # Whatever the client raises, there was no answer.
    except Exception:
        return False
    return True


def _fetched(metadata: Any) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, file in metadata.files_metadata.items():
        for key, tensor in file.tensors.items():
            first, last = tensor.data_offsets
            entries[key] = Entry(Path(name), tensor.dtype, tuple(tensor.shape), first, last - first)
    return entries
