"""Load a model folder with mlx-lm, or say in one line why that cannot be."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import torch
from mlx import nn
from mlx_lm import utils as mlx_lm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from layerscope.errors import ConfigError, IdentityError, ModelError
from layerscope.models import identities
from layerscope.models.backends.huggingface.files import (
    ModelFolder,
    check_folder,
    find_folder,
    has_tokenizer,
    is_mlx_quantised,
    one_line,
)
from layerscope.models.backends.huggingface.fingerprints import (
    hash_files,
    hash_tokenizer,
    versions,
)
from layerscope.models.backends.huggingface.loading import check_sizes, read_config
from layerscope.models.backends.mlx.arrays import mlx_dtype
from layerscope.models.backends.mlx.backend import MlxBackend
from layerscope.models.backends.mlx.configs import TRANSLATED, differences, overrides, windows
from layerscope.models.backends.mlx.families import family_of
from layerscope.models.backends.mlx.guessing import guesses
from layerscope.models.backends.mlx.structure import bind
from layerscope.models.devices import dtype_name, parse_dtype
from layerscope.models.identities import IdentityReport


@dataclass(frozen=True, eq=False)
class LoadedMlx:
    """A model of mlx-lm with its Hugging Face tokenizer, and where both came from."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    folder: ModelFolder
    dtype: torch.dtype
    dtype_reason: str
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """Last part of the id or folder."""
        return self.folder.name

    @property
    def source(self) -> str:
        """The id or folder."""
        return self.folder.source

    def provenance(self) -> dict[str, Any]:
        """Return what is needed to load the same model again, ready for JSON."""
        return {
            "id": self.folder.source,
            "kind": self.folder.kind,
            "revision": self.folder.revision,
            "model_class": f"{type(self.model).__module__}.{type(self.model).__name__}",
            "model_type": str(getattr(self.model, "model_type", "")),
            "weights_sha256": hash_files(self.folder.weight_files),
            "tokenizer_sha256": hash_tokenizer(self.tokenizer),
            "device": str(mx.default_device()),
            "dtype": dtype_name(self.dtype),
            "dtype_reason": self.dtype_reason,
            "versions": versions()
            | {package: metadata.version(package) for package in ("mlx", "mlx-lm")},
            **self.notes,
        }


def load_mlx(
    source: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> tuple[MlxBackend, LoadedMlx, IdentityReport | None]:
    """Load a folder or hub id with mlx-lm and prove its identities.

    Args:
        source: hub id or local folder, of Hugging Face or mlx-lm, quantised by it or not.
        tokenizer: replaces the folder's own.
        device: None or "cpu"; MLX chooses its own.
        dtype: of the weights (of a quantised model: of its scales); by default float32 on a CPU,
            as stored on an accelerator.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the tokenizer.
        verify: prove the identities.

    Raises:
        ModelError: the folder, its weights or its family cannot be read here.
        ConfigError: the device or dtype is not MLX's.
        IdentityError: the model fails an identity.
    """
    if not isinstance(source, str | Path):
        raise ModelError(
            f"the mlx backend loads folders and hub ids, not a {type(source).__name__}: save the "
            "model with save_pretrained(folder) and give the folder"
        )
    if device is not None and str(device) not in ("cpu", "auto"):
        raise ConfigError(f"the mlx backend chooses its own device; leave out device={device!s}")
    wanted = None if dtype is None else mlx_dtype(parse_dtype(dtype))
    folder = find_folder(source, revision=revision, custom_code=trust_remote_code)
    check_folder(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer = _tokenizer(folder, trust_remote_code)
    model, raw = _read(folder, config)
    reason = _cast(model, wanted)
    _evaluate(model)
    backend, report = _open(model, config, folder.name, verify=verify)
    found = differences(config, backend.structure.family, cast(Any, model).args)
    for difference in found:
        warnings.warn(f"{folder.name}: {difference}", stacklevel=3)
    check_sizes(tokenizer, backend.info.n_embeddings, folder.source, warn=True)
    notes = {"quantisation": _quantisation(raw), "differs_from_huggingface": found}
    loaded = LoadedMlx(model, tokenizer, folder, backend.dtype, reason, notes)
    return backend, loaded, report


def _open(
    model: nn.Module, config: Any, name: str, *, verify: bool
) -> tuple[MlxBackend, IdentityReport | None]:
    """Return the backend whose structure passes the identities."""
    listed = family_of(config.model_type)
    seen = windows(config, _n_layers(config))
    failures: list[ModelError] = []
    for family in guesses(model, config.model_type) if listed is None else [listed]:
        try:
            backend = MlxBackend(model, bind(model, family, config, seen), config)
            if listed is not None and not verify:
                return backend, None
            report = identities.check(backend, thorough=listed is None)
            report.require(name)
            if listed is None:
                backend.require_plain_attention()
                backend.prove_cache()
            return backend, report
        except ModelError as error:
            failures.append(error)
        # mlx-lm's code runs here for the first time; whatever it raises means one thing.
        except Exception as error:
            line = f"{type(error).__name__}: {one_line(error)}"
            failure = ModelError(f"{name} cannot be run by mlx-lm: {line}")
            failure.__cause__ = error
            failures.append(failure)
    if listed is not None:
        raise failures[0]
    raise IdentityError(
        f"model type '{config.model_type}' is not in the mlx backend's family table and no known "
        f"layout fits it: {failures[0] if failures else 'its blocks are unlike any'}"
    )


def _read(folder: ModelFolder, known: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build mlx-lm's model and read its weights."""
    classes = inspect.signature(mlx_lm.load_model).parameters["get_model_classes"].default

    def find(config: dict[str, Any]) -> tuple[type, type]:
        model, args = classes(config=config)
        names = inspect.signature(args).parameters
        translated = overrides(known, names)
        for name, value in translated.items():
            # What mlx-lm finds under today's names stays as it stands in the file.
            if name in TRANSLATED or config.get(name) is None:
                config[name] = value
        return _renaming(model), args

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints its warnings
            model, read = mlx_lm.load_model(folder.path, lazy=True, get_model_classes=find)
    except ModelError:
        raise
    # Unknown types, fields, quantisations and weights that do not fit: all mean the same here.
    except Exception as error:
        raise ModelError(
            f"mlx-lm {metadata.version('mlx-lm')} cannot load {folder.source}: "
            f"{' '.join(str(error).split())[:300]}; use the 'huggingface' backend"
        ) from error
    object.__setattr__(model, "__class__", type(model).__bases__[0])
    return model, read


def _renaming(model: type) -> type:
    """Return a model class that also reads weights as transformers names them today (GPT-2)."""

    def sanitize(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        if weights and self.model_type == "gpt2":
            weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        own = getattr(super(type(self), self), "sanitize", None)
        return weights if own is None else own(weights)

    return type(model.__name__, (model,), {"sanitize": sanitize})


def _cast(model: nn.Module, wanted: mx.Dtype | None) -> str:
    """Put floating-point weights in the dtype that was asked for; say why it is this one."""
    reason = "asked for"
    if wanted is None:
        if mx.default_device() != mx.cpu:
            return "as stored: MLX runs on an accelerator here"
        wanted, reason = mx.float32, "default on a CPU"
    model.set_dtype(wanted)
    return reason


def _evaluate(model: nn.Module) -> None:
    """Compute every array of a model, so that any thread may run it."""
    mx.eval([value for module in model.modules() for value in module.values() if _is_array(value)])


def _is_array(value: object) -> bool:
    return isinstance(value, mx.array)


def _quantisation(config: dict[str, Any]) -> dict[str, Any] | None:
    if not is_mlx_quantised(config):
        return None
    found = config.get("quantization") or config["quantization_config"]
    return {name: found.get(name) for name in ("bits", "group_size", "mode") if name in found}


def _n_layers(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def _tokenizer(folder: ModelFolder, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Without its files transformers would make up an empty tokenizer from the model type.
    if not has_tokenizer(folder.path) and not trust_remote_code:
        raise ModelError(
            f"{folder.source} has no tokenizer (no tokenizer.json, tokenizer.model or vocabulary): "
            "add its files or pass tokenizer=..."
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    # The tokenizers library raises bare Exceptions for damaged files.
    except Exception as error:
        raise ModelError(
            f"cannot load the tokenizer of {folder.source}: {one_line(error)}; repair its files or "
            "pass tokenizer=..."
        ) from error
    return cast(PreTrainedTokenizerBase, loaded)
