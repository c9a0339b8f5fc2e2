"""Which lenses a run uses: found by name, in a given folder or where a fit puts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from layerscope.errors import LensError, nearest
from layerscope.files import safe_name
from layerscope.lenses.artifacts import JSON_FILE, load_lens, read_details
from layerscope.lenses.base import Lens, NormChoice
from layerscope.lenses.registry import LENS_NAMES, get_lens
from layerscope.models.language_model import LanguageModel

DEFAULT_FOLDER = Path("layerscope-lenses")
FITTED_NAMES: tuple[str, ...] = ("temperature", "bias", "prism", "tuned", "jacobian")
ALL_LENSES: tuple[str, ...] = (*LENS_NAMES, *FITTED_NAMES)
AUTO = "auto"
# A fit of a tuned lens stores these beside it.
_BESIDE_TUNED = ("bias", "temperature")


@dataclass(frozen=True, eq=False)
class FoundLens:
    """A lens that was asked for: ready to use, or why it is not.

    Attributes:
        name: "raw", "norm", "tuned", ...
        lens: the lens; None where `status` is not "ready".
        status: "ready", "missing" (there is no artifact) or "refused" (it does not fit).
        reason: one line where it is not ready.
        folder: where the artifact lies; None for raw and norm.
        identity: what decides its numbers: hash of the tensors, kind, norm, convention.
        facts: what a fit recorded: held-out figures, text, tokens, seed, verdict.
        warnings: one line each, such as a lens that is no better than its baseline.
    """

    name: str
    lens: Lens | None
    status: str = "ready"
    reason: str | None = None
    folder: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the lens and its place, ready for JSON."""
        found: dict[str, Any] = {"status": self.status}
        if self.reason is not None:
            found["reason"] = self.reason
        if self.identity:
            found |= {**self.identity, **self.facts, "warnings": list(self.warnings)}
        return found


def default_folder(model_id: str, name: str) -> Path:
    """Return where `layerscope fit` puts a lens of a model, below the working directory."""
    return DEFAULT_FOLDER / safe_name(model_id) / name


def find_lenses(
    names: Sequence[str],
    model: LanguageModel,
    *,
    norm: NormChoice = "final",
    artifacts: Mapping[str, str | Path] | None = None,
) -> tuple[FoundLens, ...]:
    """Find every lens of a run.

    Args:
        names: of lenses; "auto" stands for raw, norm and every fitted lens there is for the model.
        model: the model they are to read.
        norm: the norm choice of the run.
        artifacts: folders by name; without one, a fitted lens is looked for where `layerscope fit`
            puts it (bias and temperature also beside the tuned lens).

    Returns:
        One entry per lens. Only those that "auto" stands for may be missing or refused.

    Raises:
        LensError: a lens that was named is missing, or does not fit the model or the norm.
    """
    given = {name: Path(path) for name, path in (artifacts or {}).items()}
    wanted = list(ALL_LENSES) if AUTO in names else list(names)
    return tuple(
        find_lens(name, model, norm=norm, given=given, required=name in names or name in given)
        for name in wanted
    )


def find_lens(
    name: str,
    model: LanguageModel,
    *,
    norm: NormChoice,
    given: Mapping[str, Path],
    required: bool = True,
) -> FoundLens:
    """Find one lens; see `find_lenses`. What is not `required` may come back missing or refused."""
    if name in LENS_NAMES:
        return FoundLens(name, get_lens(name, model, norm=norm))
    if name not in FITTED_NAMES:
        raise LensError(f"unknown lens {name!r}{nearest(name, ALL_LENSES)}")
    folder = _folder(name, model, given)
    if folder is None:
        reason = _missing(name, model)
        if required:
            raise LensError(reason)
        return FoundLens(name, None, "missing", reason)
    try:
        return _load(name, folder, model, norm)
    except LensError as error:
        if required:
            raise
        return FoundLens(name, None, "refused", str(error), str(folder))


def beside_tuned(
    name: str, tuned: FoundLens, model: LanguageModel, *, norm: NormChoice
) -> FoundLens | None:
    """Return a baseline that is stored beside a tuned lens, None where there is none."""
    if tuned.folder is None or not _holds(Path(tuned.folder), name):
        return None
    return _load(name, Path(tuned.folder), model, norm)


def _folder(name: str, model: LanguageModel, given: Mapping[str, Path]) -> Path | None:
    """Return the folder of a lens, or None where there is none."""
    if name in given:
        return given[name]
    ids = [str(id_) for id_ in (model.provenance().get("id"), model.name) if id_]
    places = [default_folder(id_, name) for id_ in ids]
    if name in _BESIDE_TUNED:
        beside = [given["tuned"]] if "tuned" in given else []
        beside += [default_folder(id_, "tuned") for id_ in ids]
        places += [place for place in beside if _holds(place, name)]
    return next((place for place in places if (place / JSON_FILE).is_file()), None)


def _holds(folder: Path, name: str) -> bool:
    try:
        return name in read_details(folder)["conventions"]
    except LensError:
        return False


def _missing(name: str, model: LanguageModel) -> str:
    id_ = str(model.provenance().get("id") or model.name)
    kind = "tuned" if name == "bias" else name
    return (
        f"there is no {name} lens for {model.name} in {default_folder(id_, kind)}; make one with "
        f"`layerscope fit {kind} {id_} --text FILE`, or name its folder ({name}=FOLDER)"
    )


def _load(name: str, folder: Path, model: LanguageModel, norm: NormChoice) -> FoundLens:
    stored = read_details(folder)
    lens = load_lens(folder, model, norm=norm, kind=name)
    conventions = cast("dict[str, str]", stored["conventions"])
    own = stored["kind"] == name
    identity = {
        "kind": name,
        "norm": stored["norm"],
        "convention": conventions[name],
        "tensors_sha256": stored["tensors_sha256"],
    }
    facts = {
        "fitted_with": stored["kind"],
        **{key: stored.get(key) for key in ("held_out", "corpus", "data", "options")},
        "verdict": stored.get("verdict") if own else None,
    }
    # A baseline stored beside a lens is not what that lens's warnings are about.
    warnings = tuple(str(line) for line in stored.get("warnings") or ()) if own else ()
    return FoundLens(
        name,
        cast("Lens", lens),
        folder=str(folder),
        identity=identity,
        facts=facts,
        warnings=warnings,
    )
