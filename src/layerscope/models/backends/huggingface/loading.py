"""Load a causal language model and its tokenizer, or say in one line why that cannot be."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from layerscope.errors import CapabilityError, ModelError
from layerscope.models.backends.huggingface.files import (
    ModelFolder,
    check_folder,
    find_folder,
    has_tokenizer,
    one_line,
    refuse_other_formats,
)
from layerscope.models.backends.huggingface.fingerprints import (
    hash_files,
    hash_tokenizer,
    hash_weights,
    versions,
)
from layerscope.models.backends.huggingface.placing import DeviceMap, Request, decide
from layerscope.models.backends.huggingface.quantised import (
    Scheme,
    disallows,
    require_packages,
    require_plain_ends,
    scheme_of,
    scheme_of_model,
)
from layerscope.models.backends.huggingface.reading import Source, read
from layerscope.models.backends.huggingface.sizes import read_sizes
from layerscope.models.backends.huggingface.weights import read_headers
from layerscope.models.devices import DeviceLike, DtypeLike, dtype_name, place, present

_NEEDS_CAUSAL = "layerscope reads causal (decoder-only) models: load one with AutoModelForCausalLM"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model with its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    kind: str
    """``folder``, ``hub`` or ``memory``."""
    revision: str | None
    """Commit of a hub snapshot, else None."""
    dtype_reason: str
    weight_files: tuple[Path, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return _embedding_weight(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype

    @property
    def weights_hash(self) -> str:
        """The sha256 of the safetensors files; for a model built in memory, of its weights now.

        Raises:
            CapabilityError: it was built in memory, and kernels have repacked its weights.
        """
        if self.weight_files:
            return hash_files(self.weight_files)
        reason = disallows(scheme_of_model(self.model), "memory_hash")
        if reason is not None:
            raise CapabilityError(reason)
        return hash_weights(self.model)

    @property
    def tokenizer_hash(self) -> str:
        """The sha256 of the tokenizer's serialisation."""
        return hash_tokenizer(self.tokenizer)

    def provenance(self) -> dict[str, Any]:
        """Return what is needed to load the same model again, ready for JSON."""
        return {
            "id": self.source,
            "kind": self.kind,
            "revision": self.revision,
            "model_class": type(self.model).__name__,
            "model_type": str(self.model.config.model_type),
            "weights_sha256": self.weights_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "dtype_reason": self.dtype_reason,
            "versions": versions(),
            **self.notes,
        }


def load_pretrained(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verbose: bool = False,
) -> LoadedModel:
    """Load a causal language model by hub id or folder, or take one that is already built.

    Args:
        source: hub id, local folder, or a model. A complete snapshot in the hub cache is used
            without asking the network for a newer one. A given model is put in eval mode, and
            moved or cast (in place) only if `device` or `dtype` ask for it.
        tokenizer: replaces the folder's own; required with a model that is already built.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto`` (default): the first accelerator with room,
            several CUDA devices together, or the CPU; every attempt is in the provenance.
        dtype: e.g. ``bf16``; default: float32 on CPU, bfloat16 on accelerators that have it.
        device_map: ``auto`` or devices by module, to split a model over several CUDA devices.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        verbose: let transformers log and show its progress.

    Raises:
        ModelError: the model or tokenizer is missing, damaged, not causal, or they do not fit; what
            a quantised model needs is not installed; there is not enough memory (before anything
            is loaded; says how much is missing and what would fit).
        ConfigError: the device or dtype is unknown or absent.
    """
    if isinstance(source, str | Path):
        request = Request.of(device, dtype, device_map)
        folder = find_folder(source, revision=revision, custom_code=trust_remote_code)
        with _quiet(verbose):
            loaded = _load_folder(folder, request, tokenizer, trust_remote_code)
    else:
        if revision is not None:
            raise ModelError("revision is for hub ids, and this model is already built")
        if device_map is not None:
            raise ModelError("device_map is for loading, and this model is already built")
        loaded = _take(source, tokenizer, device, dtype)
    loaded.model.eval()
    d_vocab = _embedding_weight(loaded.model).shape[0]
    check_sizes(loaded.tokenizer, d_vocab, loaded.source, warn=True)
    return loaded


def check_sizes(
    tokenizer: PreTrainedTokenizerBase, d_vocab: int | None, source: str, *, warn: bool = False
) -> None:
    """Check that a model knows every token of its tokenizer.

    Special tokens added beyond the model's vocabulary are tolerated (some families ship an image
    token that their text model lacks): using one in a prompt is an error there.

    Raises:
        ModelError: the tokenizer has ids that the model does not know.
    """
    if d_vocab is None:
        return
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocabulary = tokenizer.get_vocab()
    beyond = [id_ for id_ in vocabulary.values() if id_ >= d_vocab and id_ not in special]
    if beyond:
        raise ModelError(
            f"the tokenizer has ids up to {max(beyond)} and {source} knows only {d_vocab} tokens: "
            "it belongs to another model"
        )
    if warn and 2 * len(vocabulary) < d_vocab:
        warnings.warn(
            f"the tokenizer has {len(vocabulary)} tokens and {source} {d_vocab}: does it belong to "
            "this model?",
            stacklevel=3,
        )


def check_causal(config: PreTrainedConfig, source: str, *, custom_code: bool = False) -> None:
    """Refuse encoders and encoder-decoders, which transformers would load as something else.

    Raises:
        ModelError: the configuration is not that of a causal language model.
    """
    kind = str(getattr(config, "model_type", ""))
    what = None
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        what = "an encoder (masked language) model"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not custom_code:
        what = "not a causal language model"
    if what is not None:
        raise ModelError(f"{source} is {what} (type {kind!r}); {_NEEDS_CAUSAL}")


def read_config(folder: ModelFolder, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the configuration of a causal language model.

    Raises:
        ModelError: it is damaged, of an unknown type, or not that of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    # Configurations fail in many ways (JSON, unknown type, validation): all mean the same here.
    except Exception as error:
        raise ModelError(_config_message(folder, error)) from error
    custom = trust_remote_code and bool(getattr(config, "auto_map", None))
    check_causal(config, folder.source, custom_code=custom)
    return config


def _load_folder(
    folder: ModelFolder,
    request: Request,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """Check everything that can be checked without weights, decide where they go, read them."""
    refuse_other_formats(folder)
    check_folder(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer = _load_tokenizer(folder, trust_remote_code)
    check_sizes(tokenizer, _config_vocab_size(config), folder.source)
    scheme = scheme_of(config)
    if scheme is not None:
        require_packages(scheme, folder.source)
    entries = read_headers(folder.weight_files)
    custom = trust_remote_code and bool(getattr(config, "auto_map", None))
    sizes = read_sizes(folder.source, config, entries, custom_code=custom)
    decision = decide(sizes, request, present())
    read_from = Source(folder, config, entries, scheme, trust_remote_code)
    outcome = read(read_from, decision, request)
    placed: Any = getattr(outcome.model, "hf_device_map", None)
    spread = placed if len(outcome.chosen.devices) > 1 else None
    notes: dict[str, Any] = {
        "placement": outcome.chosen.where,
        "device_map": None if spread is None else {name: str(at) for name, at in spread.items()},
        "load_attempts": list(outcome.attempts),
        "quantisation": _quantisation(scheme, scheme_of_model(outcome.model)),
        "unused_weights": list(outcome.unused[:20]),
        "n_unused_weights": len(outcome.unused),
    }
    return LoadedModel(
        outcome.model,
        tokenizer,
        folder.name,
        folder.source,
        folder.kind,
        folder.revision,
        outcome.chosen.reason,
        folder.weight_files,
        notes,
    )


def _quantisation(stored: Scheme | None, packed: Scheme | None) -> dict[str, Any] | None:
    """Say how the files are quantised, and whether the weights are still packed in memory."""
    if stored is None:
        return None
    return {**stored.to_dict(), "unpacked": packed is None}


def _take(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    device: DeviceLike | None,
    dtype: DtypeLike | None,
) -> LoadedModel:
    """Wrap a model that is already built."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"cannot load a {type(model).__name__}: give a hub id, a folder or a PreTrainedModel"
        )
    source = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        raise ModelError(f"{source} is already built: pass its tokenizer too (tokenizer=...)")
    check_causal(model.config, source, custom_code=True)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no unembedding; {_NEEDS_CAUSAL}")
    reason = "as given"
    scheme = scheme_of_model(model)
    if scheme is not None:
        require_plain_ends(model, source)
        moved = device is not None and place(device, model.dtype).device != model.device
        for asked, what in ((dtype is not None, "cast"), (moved, "move")):
            refused = disallows(scheme, what)
            if asked and refused is not None:
                raise CapabilityError(refused)
    if device is not None or dtype is not None:
        placement = place(
            model.device if device is None else device, model.dtype if dtype is None else dtype
        )
        if dtype is None:
            model.to(placement.device)  # pyright: ignore[reportArgumentType]
        else:
            model.to(device=placement.device, dtype=placement.dtype)  # pyright: ignore[reportCallIssue]
        reason = placement.reason if dtype is not None else "as given"
    name = source.rstrip("/").rsplit("/", 1)[-1]
    notes = {"quantisation": _quantisation(scheme, scheme)}
    return LoadedModel(model, tokenizer, name, source, "memory", None, reason, notes=notes)


def _embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def _config_message(folder: ModelFolder, error: Exception) -> str:
    try:
        content = json.loads((folder.path / "config.json").read_text("utf-8"))
    except ValueError:
        return f"{folder.source} has a damaged config.json: download it again"
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind is None:
        return f"{folder.source}: config.json names no model_type; it is not a transformers model"
    if "auto_map" in content:
        return (
            f"{folder.source} brings its own code: read it, then pass trust_remote_code=True "
            f"({one_line(error)})"
        )
    version = metadata.version("transformers")
    return (
        f"{folder.source}: transformers {version} cannot read model type {kind!r} "
        f"({one_line(error)}); a newer transformers may"
    )


def _config_vocab_size(config: PreTrainedConfig) -> int | None:
    """Return the vocabulary size a configuration promises, to refuse before reading weights."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _load_tokenizer(folder: ModelFolder, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Without its files transformers would make up an empty tokenizer from the model type.
    if not has_tokenizer(folder.path) and not trust_remote_code:
        raise ModelError(
            f"{folder.source} has no tokenizer (no tokenizer.json, tokenizer.model or vocabulary): "
            "add its files or pass tokenizer=..."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    # The tokenizers library raises bare Exceptions for damaged files.
    except Exception as error:
        raise ModelError(
            f"cannot load the tokenizer of {folder.source}: {one_line(error)}; repair its files or "
            "pass tokenizer=..."
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


@contextmanager
def _quiet(verbose: bool) -> Generator[None]:
    """Keep transformers from logging and from drawing progress bars; restore both after."""
    if verbose:
        yield
        return
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
