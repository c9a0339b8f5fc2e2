"""Lenses found by name: given folders, the default place, and why one is missing or refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from layerscope.errors import LensError
from layerscope.lenses import ALL_LENSES, FoundLens, default_folder, find_lenses
from layerscope.lenses.find import beside_tuned
from layerscope.models import LanguageModel
from support.lens_artifacts import stored
from support.loaded import loaded


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.chdir(tmp_path)
    return loaded("llama")


def place(model: LanguageModel, name: str) -> Path:
    return default_folder(str(model.provenance().get("id") or model.name), name)


def by_name(found: tuple[FoundLens, ...]) -> dict[str, FoundLens]:
    return {entry.name: entry for entry in found}


def test_a_given_folder_comes_before_the_default_place(
    model: LanguageModel, tmp_path: Path
) -> None:
    stored("tuned", model, place(model, "tuned"), noise=0.1)
    mine = stored("tuned", model, tmp_path / "mine")
    (default,) = find_lenses(("tuned",), model)
    (given,) = find_lenses(("tuned",), model, artifacts={"tuned": mine})
    assert given.folder == str(mine) and default.folder == str(place(model, "tuned"))
    assert given.identity["tensors_sha256"] != default.identity["tensors_sha256"]


def test_a_missing_lens_is_one_line_that_names_the_fit(model: LanguageModel) -> None:
    for name, kind in (("prism", "prism"), ("bias", "tuned")):
        with pytest.raises(LensError) as caught:
            find_lenses(("norm", name), model)
        assert f"`layerscope fit {kind} " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_auto_takes_what_fits_and_says_what_is_missing_or_refused(
    model: LanguageModel,
) -> None:
    stored("tuned", model, place(model, "tuned"), beside=("bias", "temperature"))
    stored("prism", loaded("gpt2"), place(model, "prism"))
    found = by_name(find_lenses(("auto",), model))
    assert tuple(found) == ALL_LENSES
    ready = {name for name, entry in found.items() if entry.lens is not None}
    assert ready == {"raw", "norm", "tuned", "bias", "temperature"}
    assert found["prism"].status == "refused" and "another model" in (found["prism"].reason or "")
    assert found["jacobian"].status == "missing"
    assert found["bias"].facts["fitted_with"] == "tuned"
    assert set(found["jacobian"].to_dict()) == {"status", "reason"}


def test_auto_still_refuses_a_folder_that_was_named(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="there is no lens in"):
        find_lenses(("auto",), model, artifacts={"prism": tmp_path / "nothing"})


def test_a_norm_choice_that_does_not_fit_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    folder = stored("tuned", model, tmp_path / "tuned")
    with pytest.raises(LensError, match="fitted with norm 'final', not 'next_norm'"):
        find_lenses(("tuned",), model, norm="next_norm", artifacts={"tuned": folder})


def test_another_model_width_or_tokenizer_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    folder = stored("tuned", loaded("gpt2"), tmp_path / "tuned")
    with pytest.raises(LensError, match="was fitted to another model"):
        find_lenses(("tuned",), model, artifacts={"tuned": folder})


def test_pickles_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "params.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(LensError, match="pickled weights"):
        find_lenses(("tuned",), model, artifacts={"tuned": tmp_path})


def test_a_folder_of_another_kind_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    folder = stored("prism", model, tmp_path / "prism")
    with pytest.raises(LensError, match="holds no lens 'tuned'"):
        find_lenses(("tuned",), model, artifacts={"tuned": folder})


def test_warnings_of_a_fit_stay_with_its_own_lens(model: LanguageModel, tmp_path: Path) -> None:
    details = {"warnings": ["tuned does not improve on norm at 25% depth"]}
    folder = stored("tuned", model, tmp_path / "tuned", beside=("bias",), details=details)
    found = by_name(find_lenses(("tuned", "bias"), model, artifacts={"tuned": folder}))
    assert found["tuned"].warnings == tuple(details["warnings"])
    assert found["bias"].warnings == ()


def test_a_baseline_beside_a_tuned_lens(model: LanguageModel, tmp_path: Path) -> None:
    folder = stored("tuned", model, tmp_path / "tuned", beside=("temperature",))
    (tuned,) = find_lenses(("tuned",), model, artifacts={"tuned": folder})
    found = beside_tuned("temperature", tuned, model, norm="final")
    assert found is not None and found.lens is not None
    assert beside_tuned("bias", tuned, model, norm="final") is None
