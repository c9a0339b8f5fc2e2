"""Steering vectors: a direction at a site, in units of the residual there, and its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, EditError, ModelError, nearest
from layerscope.files import atomic_path, sha256_file, write_json
from layerscope.interventions.steering.operations import AddKeepingNorm
from layerscope.lenses.artifacts import model_facts
from layerscope.models import Add, Clamp, Edit, LanguageModel, ProjectOut, Scope, Site

VERSION = 1
TENSORS_FILE = "vector.safetensors"
JSON_FILE = "vector.json"

Mode = Literal["add", "norm_preserving", "clamp", "project"]
MODES: tuple[Mode, ...] = ("add", "norm_preserving", "clamp", "project")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the residual stream.

    Attributes:
        site: where it was read and acts, such as ``resid_post.4``.
        vector: [d_model], as estimated; its length has meaning for `coefficient` alone.
        typical_norm: median length of the residual there, the unit of `alpha`; None where it was
            not measured (`calibrate` does).
        method: how it was estimated.
        details: its origin, ready for JSON.
    """

    site: str
    vector: Float[Tensor, " d_model"]
    typical_norm: float | None = None
    method: str = "mean_difference"
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not bool(self.vector.isfinite().all()):
            raise EditError("a steering vector is one finite vector of shape [d_model]")
        if not float(self.vector.norm()) > 0:
            raise EditError(
                f"the steering vector at {self.site} is zero: its contrasts do not differ"
            )

    @property
    def layer(self) -> int | None:
        """The block whose site it is."""
        return Site.parse(self.site).layer

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The direction, of length 1."""
        return self.vector / self.vector.norm()

    def per_alpha(self) -> Float[Tensor, " d_model"]:
        """Return what alpha = 1 adds: the direction at the length of a typical residual.

        Raises:
            ConfigError: the typical length was not measured.
        """
        if self.typical_norm is None:
            raise ConfigError(
                f"the vector at {self.site} has no typical norm to measure alpha in: calibrate() "
                "it, or give a coefficient"
            )
        return self.unit * self.typical_norm

    def edit(
        self,
        alpha: float | Sequence[float] | None = None,
        *,
        coefficient: float | None = None,
        mode: Mode = "add",
        rows: int | Sequence[int] | None = None,
        scope: Scope | str | None = None,
        positions: Any = None,
    ) -> Edit:
        """Return the edit that steers; pass it to `run` or `generate`.

        Args:
            alpha: strength in typical residual lengths; one, or one for each row.
            coefficient: instead of alpha: what the vector as estimated is multiplied by.
            mode: "add"; "norm_preserving" adds and restores each residual's length; "clamp" sets
                the coordinate along the direction to alpha; "project" removes it and takes no
                strength.
            rows: batch rows; None for all.
            scope: which tokens, see `Scope`; None for all.
            positions: instead of a scope.

        Raises:
            ConfigError: mode and strength do not fit, or the typical length was not measured.
        """
        where: dict[str, Any] = {"rows": rows, "scope": scope, "positions": positions}
        if mode not in MODES:
            raise ConfigError(
                f"unknown mode '{mode}'{nearest(mode, MODES)}; use {', '.join(MODES)}"
            )
        if mode == "project":
            if alpha is not None or coefficient is not None:
                raise ConfigError("mode 'project' removes the direction: leave out the strength")
            return ProjectOut(self.site, self.vector, **where)
        if (alpha is None) == (coefficient is None):
            raise ConfigError("give a strength: alpha, or a coefficient")
        if mode == "clamp":
            if not isinstance(alpha, int | float):
                raise ConfigError("mode 'clamp' takes one alpha")
            level = float(alpha) * float(self.per_alpha().norm())
            return Clamp(self.site, self.vector, minimum=level, maximum=level, **where)
        value, factor = self._strength(alpha, coefficient)
        kind = Add if mode == "add" else AddKeepingNorm.of
        return kind(self.site, value, factor, **where)

    def _strength(
        self, alpha: float | Sequence[float] | None, coefficient: float | None
    ) -> tuple[Tensor, float]:
        if coefficient is not None:
            return self.vector, float(coefficient)
        if isinstance(alpha, int | float):
            return self.per_alpha(), float(alpha)
        each = torch.tensor([float(value) for value in cast("Sequence[float]", alpha)])
        return each[:, None, None] * self.per_alpha().cpu(), 1.0


def save_vector(vector: SteeringVector, folder: Path, model: LanguageModel) -> Path:
    """Write a vector and its origin to a folder, bound to the model; returns the folder.

    Raises:
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    path = folder / TENSORS_FILE
    with atomic_path(path) as temporary:
        save_file({"vector": vector.vector.detach().cpu().contiguous()}, temporary)
    write_json(
        folder / JSON_FILE,
        {
            "format": "layerscope-steering-vector",
            "version": VERSION,
            "site": vector.site,
            "typical_norm": vector.typical_norm,
            "method": vector.method,
            "model": model_facts(model),
            "tensors_sha256": sha256_file(path),
            "details": dict(vector.details),
        },
    )
    return folder


def load_vector(
    folder: str | Path, model: LanguageModel, *, site: str | None = None
) -> SteeringVector:
    """Read a vector, after checking that it belongs to this model.

    Args:
        folder: what `save_vector` wrote.
        model: the model to be steered.
        site: where it is wanted; another site than its own is refused.

    Raises:
        ModelError: there is none, it is damaged, or it was made for another model, width or site.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    path = folder / TENSORS_FILE
    try:
        stored: Any = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        if stored["format"] != "layerscope-steering-vector" or stored["version"] != VERSION:
            raise ModelError(
                f"{folder} holds no steering vector of version {VERSION}; make it anew"
            )
        _check_model(stored["model"], model, folder)
        if sha256_file(path) != stored["tensors_sha256"]:
            raise ModelError(f"{path} is not the file that {JSON_FILE} describes; make it anew")
        tensor = load_file(path)["vector"]
        found = SteeringVector(
            str(stored["site"]), tensor, stored["typical_norm"], stored["method"], stored["details"]
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"there is no readable steering vector in {folder}: {error}") from error
    if tuple(tensor.shape) != (model.d_model,):
        raise ModelError(
            f"the vector in {folder} has shape {list(tensor.shape)}; this model needs "
            f"[{model.d_model}]"
        )
    known = [str(each) for each in model.sites()]
    if found.site not in known:
        raise ModelError(f"the vector in {folder} acts at {found.site}, which this model lacks")
    if site is not None and str(Site.parse(site).resolve(model.n_layers, 1, 1)) != found.site:
        raise ModelError(
            f"the vector in {folder} was made at {found.site}, not at {site}: layers do not share "
            "directions; use it there, or make another"
        )
    return found


def _check_model(theirs: Mapping[str, Any], model: LanguageModel, folder: Path) -> None:
    ours = model_facts(model)
    for key, what in (
        ("d_model", "the width of the residual stream"),
        ("n_layers", "the number of blocks"),
        ("tokenizer_sha256", "the tokenizer"),
        ("weights_sha256", "the weights"),
    ):
        if theirs.get(key) != ours[key]:
            had, has = (str(value)[:12] for value in (theirs.get(key), ours[key]))
            raise ModelError(
                f"the vector in {folder} was made for another model ({theirs.get('id')}): {what} "
                f"differs ({had}, here {has}); load that model, or make a vector for this one"
            )
