"""The folder layout of the tuned-lens library: `params.pt` and `config.json`.

See AlignmentResearch/tuned-lens.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from layerscope.errors import LensError
from layerscope.files import atomic_path, write_json
from layerscope.lenses.fitted import TunedLens
from layerscope.models.language_model import LanguageModel

PARAMS, CONFIG = "params.pt", "config.json"


def write_tuned_lens(lens: TunedLens, folder: str | Path, model: LanguageModel) -> Path:
    """Write a tuned lens so that ``TunedLens.from_model_and_pretrained`` of that library reads it.

    Low-rank factors are multiplied out. That library's translator i belongs to row i, as here.

    Raises:
        LensError: the layout cannot hold the lens: it has temperatures, or another norm.
        OutputError: the folder cannot be written.
    """
    tensors = lens.tensors()
    if "inverse_temperature" in tensors:
        raise LensError("the tuned-lens layout has no temperatures: fit without them")
    if lens.norm_choice != "final":
        raise LensError("the tuned-lens library uses the final norm only: fit with norm 'final'")
    weight = tensors.get("weight")
    if weight is None:
        weight = (tensors["down"] @ tensors["up"]).transpose(1, 2)
    state: dict[str, Tensor] = {}
    for row in range(model.n_layers):
        state[f"{row}.weight"] = weight[row].detach().cpu().contiguous().clone()
        state[f"{row}.bias"] = tensors["bias"][row].detach().cpu().clone()
    folder = Path(folder)
    with atomic_path(folder / PARAMS) as temporary:
        torch.save(state, temporary)
    found = model.provenance()
    write_json(
        folder / CONFIG,
        {
            "base_model_name_or_path": found.get("id"),
            "d_model": model.d_model,
            "num_hidden_layers": model.n_layers,
            "bias": True,
            "base_model_revision": found.get("revision"),
            "unembed_hash": unembed_hash(model),
            "lens_type": "linear_tuned_lens",
        },
    )
    return folder


def read_tuned_lens(folder: str | Path, model: LanguageModel) -> TunedLens:
    """Read a folder of the tuned-lens library; the pickle is opened by a restricted unpickler.

    Raises:
        LensError: a file is missing or holds more than tensors, or the lens is of another model.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    for key, ours in (("d_model", model.d_model), ("num_hidden_layers", model.n_layers)):
        if config.get(key) != ours:
            raise LensError(
                f"the lens in {folder} is of another model: {key} is {config.get(key)}, here {ours}"
            )
    theirs = config.get("unembed_hash")
    if theirs and theirs != unembed_hash(model):
        raise LensError(
            f"the lens in {folder} was trained with another unembedding "
            f"({config.get('base_model_name_or_path')}); load that model"
        )
    state = _state(folder / PARAMS)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for row in range(model.n_layers):
        weight, bias = state.get(f"{row}.weight"), state.get(f"{row}.bias")
        if weight is None or tuple(weight.shape) != (model.d_model, model.d_model):
            raise LensError(
                f"{folder / PARAMS} has no translator {row} of {model.d_model} x {model.d_model}"
            )
        weights.append(weight.float())
        biases.append(torch.zeros(model.d_model) if bias is None else bias.float())
    return TunedLens(model, {"weight": torch.stack(weights), "bias": torch.stack(biases)})


def unembed_hash(model: LanguageModel) -> str:
    """Return that library's fingerprint of an unembedding: the sha256 of numpy's short print."""
    weight = model.unembedding.weight.detach().cpu().float().numpy()
    return hashlib.sha256(np.array_str(weight, precision=1).encode()).hexdigest()


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LensError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise LensError(f"{path} does not describe a lens")
    return cast("dict[str, Any]", found)


def _state(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LensError(
            f"{path} holds more than tensors and is not read: a pickle can run code"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        line = " ".join(str(error).split())
        raise LensError(f"{path} cannot be read: {line}") from error
    if not isinstance(found, dict) or not all(
        isinstance(value, Tensor) for value in cast("dict[Any, Any]", found).values()
    ):
        raise LensError(f"{path} does not hold a dictionary of tensors")
    return cast("dict[str, Tensor]", found)
