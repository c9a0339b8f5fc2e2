"""Fitted lenses on disk: tensors as safetensors, everything else as JSON, both checked on load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from layerscope.errors import LensError, nearest
from layerscope.files import atomic_path, sha256_file, write_json
from layerscope.lenses.base import NORM_CHOICES, NormChoice
from layerscope.lenses.fitted import FITTED, FittedLens
from layerscope.models.language_model import LanguageModel

VERSION = 1
TENSORS_FILE = "lens.safetensors"
JSON_FILE = "lens.json"
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle", "*.ckpt")
_PROBES = 8


def model_facts(model: LanguageModel) -> dict[str, Any]:
    """Return what a lens must agree with: width, depth, weights and tokenizer."""
    found = model.provenance()
    return {
        "id": found.get("id"),
        "weights_sha256": found["weights_sha256"],
        "tokenizer_sha256": found["tokenizer_sha256"],
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "d_vocab": model.d_vocab,
    }


def save_lens(
    lens: FittedLens,
    folder: Path,
    model: LanguageModel,
    *,
    others: Mapping[str, FittedLens] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write a lens, and baselines fitted beside it, to a folder; returns the folder.

    A few residuals and what the lens makes of them are stored too: `load_lens` repeats them, so a
    convention that changed (a transposed matrix, say) is an error and not a silent wrong answer.

    Args:
        lens: the lens.
        folder: created if need be; an artifact that is there is replaced.
        model: the model it was fitted to.
        others: baselines by kind.
        details: data, options, figures and versions, ready for JSON.

    Raises:
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    lenses = {lens.kind: lens, **(others or {})}
    tensors: dict[str, Tensor] = {}
    probe = _probe(model)
    for kind, each in lenses.items():
        tensors |= {f"{kind}.{name}": tensor for name, tensor in each.tensors().items()}
        tensors[f"{kind}.probe"] = _answers(each, probe, model)
    path = folder / TENSORS_FILE
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    stored = {
        "format": "layerscope-lens",
        "version": VERSION,
        "kind": lens.kind,
        "norm": lens.norm_choice,
        "conventions": {kind: each.convention for kind, each in lenses.items()},
        "model": model_facts(model),
        "tensors_sha256": sha256_file(path),
        **(details or {}),
    }
    write_json(folder / JSON_FILE, stored)
    return folder


def load_lens(
    folder: str | Path,
    model: LanguageModel,
    *,
    norm: NormChoice | None = None,
    kind: str | None = None,
) -> FittedLens:
    """Read a lens from a folder, after checking that it belongs to this model.

    Args:
        folder: what `save_lens` wrote.
        model: the model it is to read.
        norm: the norm choice that is wanted; None takes the one it was fitted with.
        kind: a baseline stored beside the lens, such as "bias"; None for the lens itself.

    Raises:
        LensError: there is no lens, it is damaged, or it was fitted to another model, tokenizer,
            width or norm; one line names what differs. Pickled weights are not read.
    """
    folder = Path(folder)
    stored = read_details(folder)
    _check_model(stored, folder, model)
    fitted_norm = stored["norm"]
    if norm is not None and norm != fitted_norm:
        raise LensError(
            f"the lens in {folder} was fitted with norm '{fitted_norm}', not '{norm}': read it "
            f"with norm '{fitted_norm}', or fit another"
        )
    wanted = kind or str(stored["kind"])
    conventions = cast("dict[str, str]", stored["conventions"])
    if wanted not in conventions or wanted not in FITTED:
        raise LensError(
            f"{folder} holds no lens '{wanted}'{nearest(wanted, conventions)}; it has "
            f"{', '.join(conventions)}"
        )
    if conventions[wanted] != FITTED[wanted].convention:
        raise LensError(
            f"the lens in {folder} follows another convention ({conventions[wanted]}); fit it anew"
        )
    tensors = _read_tensors(folder, stored, wanted)
    expected = tensors.pop("probe")
    lens: FittedLens = FITTED[wanted](model, tensors, norm=fitted_norm)
    _check_probe(lens, expected, model, folder)
    return lens


def read_details(folder: str | Path) -> dict[str, Any]:
    """Return the JSON of an artifact: model, data, options, held-out figures, warnings.

    Raises:
        LensError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    path = folder / JSON_FILE
    if not path.is_file():
        pickled = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
        if pickled:
            raise LensError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when read; for "
                "a folder of the tuned-lens library use layerscope.lenses.read_tuned_lens"
            )
        raise LensError(f"there is no lens in {folder}: {JSON_FILE} is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LensError(f"{path} cannot be read: {error}; fit the lens anew") from error
    if not isinstance(stored, dict):
        raise LensError(f"{path} does not describe a lens; fit it anew")
    found = cast("dict[str, Any]", stored)
    if found.get("format") != "layerscope-lens" or found.get("version") != VERSION:
        raise LensError(
            f"{path} is no lens of version {VERSION} (format {found.get('format')!r}, version "
            f"{found.get('version')!r}); fit it anew"
        )
    missing = [name for name in ("kind", "norm", "conventions", "model") if name not in found]
    if missing or found["norm"] not in NORM_CHOICES:
        raise LensError(f"{path} is incomplete ({', '.join(missing) or 'norm'}); fit it anew")
    return found


def _check_model(stored: dict[str, Any], folder: Path, model: LanguageModel) -> None:
    theirs, ours = stored["model"], model_facts(model)
    names = {
        "d_model": "the width of the residual stream",
        "n_layers": "the number of blocks",
        "d_vocab": "the vocabulary",
        "tokenizer_sha256": "the tokenizer",
        "weights_sha256": "the weights",
    }
    for key, what in names.items():
        if theirs.get(key) != ours[key]:
            had, has = (
                str(value)[:12] if key.endswith("sha256") else value
                for value in (theirs.get(key), ours[key])
            )
            raise LensError(
                f"the lens in {folder} was fitted to another model ({theirs.get('id')}): {what} "
                f"differs ({had}, here {has}); load that model, or fit a lens to this one"
            )


def _read_tensors(folder: Path, stored: dict[str, Any], kind: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS_FILE
    try:
        if sha256_file(path) != stored.get("tensors_sha256"):
            raise LensError(
                f"{path} is not the file that {JSON_FILE} describes (its sha256 differs); fit the "
                "lens anew"
            )
        prefix = f"{kind}."
        with safe_open(path, framework="pt") as opened:
            return {
                name.removeprefix(prefix): opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
    except (OSError, SafetensorError) as error:
        raise LensError(f"{path} cannot be read: {error}; fit the lens anew") from error


def _probe(model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_PROBES, model.d_model, generator=generator)


@torch.no_grad()
def _answers(lens: FittedLens, probe: Tensor, model: LanguageModel) -> Tensor:
    rows = probe.to(model.unembedding.weight.device, model.dtype)
    answers = [lens.transform(rows, layer).float().cpu() for layer in range(model.n_layers + 1)]
    return torch.stack(answers)


def _check_probe(lens: FittedLens, expected: Tensor, model: LanguageModel, folder: Path) -> None:
    found = _answers(lens, _probe(model), model)
    error = (found - expected).norm() / expected.norm().clamp_min(1e-12)
    # Loose enough for another device or precision; a transposed or unscaled matrix is far beyond.
    if not float(error) < 0.05:
        raise LensError(
            f"the lens in {folder} does not give what it gave when it was stored (off by "
            f"{float(error):.1%}); fit it anew"
        )
