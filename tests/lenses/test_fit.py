"""Fits end to end on tiny models: text, resume, artifacts, refusals."""

from __future__ import annotations

import json
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerscope.errors import ConfigError, LensError
from layerscope.files import sha256_file
from layerscope.lenses import (
    NormLens,
    load_lens,
    read_details,
    read_tuned_lens,
    write_tuned_lens,
)
from layerscope.lenses.fitting import (
    DataConfig,
    FitResult,
    JacobianOptions,
    Kind,
    PrismOptions,
    Progress,
    TunedOptions,
    fit_lens,
)
from layerscope.lenses.fitting import tuned as tuned_module
from layerscope.lenses.fitting.corpus import read_corpus
from layerscope.lenses.fitting.evaluate import judge, kl_bits
from layerscope.lenses.fitting.jacobian import JacobianSteps
from layerscope.lenses.fitting.states import collect, row_sites
from layerscope.lenses.fitting.text import TextSource
from support.loaded import loaded

DATA = DataConfig(tokens=4096, evaluation_tokens=1024, context=32, positions=8, batch=8)
WORDS = (
    "The",
    "capital",
    "of",
    "Germany",
    "France",
    "Italy",
    "Japan",
    "is",
    "called",
    "simply",
    "Berlin",
    "Paris",
    "Rome",
    "girl",
    "park",
)
OPTIONS: dict[str, Any] = {
    "prism": PrismOptions(rank=None),
    "tuned": TunedOptions(rank=4, temperature=True, evaluate_every=2),
    "temperature": None,
    "jacobian": JacobianOptions(sequences=6, skip=4, batch=2),
}
KINDS: tuple[Kind, ...] = ("prism", "tuned", "temperature", "jacobian")


def stories(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=40)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(400)), "utf-8")
    return path


@pytest.fixture(scope="module")
def fits(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitResult]:
    folder = tmp_path_factory.mktemp("lenses")
    model = loaded("llama")
    return {
        kind: fit_lens(kind, model, text, folder / kind, data=DATA, options=OPTIONS[kind])
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_lens_gives_the_same_rows_and_ends_in_the_models_head(
    fits: dict[str, FitResult], kind: Kind
) -> None:
    model = loaded("llama")
    result = fits[kind]
    assert result.folder is not None
    again = load_lens(result.folder, model)
    rows = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(3))
    for layer in range(model.n_layers + 1):
        assert torch.equal(again.transform(rows, layer), result.lens.transform(rows, layer))
    last = NormLens(model).transform(rows, model.n_layers)
    assert torch.equal(again.transform(rows, model.n_layers), last)
    assert again.norm_module(0) == NormLens(model).norm_module(0)
    assert result.kl_bits[kind][-1] == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(LensError, match="rows 0"):
        again.transform(rows, model.n_layers + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_artifact_says_where_it_comes_from(fits: dict[str, FitResult], kind: Kind) -> None:
    result = fits[kind]
    assert result.folder is not None
    stored = read_details(result.folder)
    assert stored["kind"] == kind
    assert stored["data"]["seed"] == 0
    assert stored["corpus"]["tokens"] == {"train": 4096, "validation": 1024, "held_out": 1024}
    assert len(stored["corpus"]["ids_sha256"]) == 64
    assert stored["held_out"]["positions"] == 1024 // 32 * 8
    assert stored["held_out"]["kl_bits"].keys() >= {"raw", "norm", "temperature", kind}
    assert "torch" in stored["versions"]
    assert stored["warnings"] == list(result.warnings)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "lens.json",
        "lens.safetensors",
    ]


@pytest.mark.parametrize("kind", ["prism", "tuned", "jacobian"])
def test_an_interrupted_fit_goes_on_and_ends_with_the_same_tensors(
    fits: dict[str, FitResult], text: Path, tmp_path: Path, kind: Kind
) -> None:
    model = loaded("llama")

    def fit(stop_at: int | None) -> FitResult:
        def stop(progress: Progress) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        return fit_lens(
            kind, model, text, tmp_path, data=DATA, options=OPTIONS[kind],
            progress=stop, checkpoint_seconds=0.0,
        )  # fmt: skip

    for stop_at in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fit(stop_at)
        assert [path.name for path in tmp_path.iterdir()] == ["fit.checkpoint.safetensors"]
    with pytest.raises(LensError, match="other settings"):
        fit_lens(kind, model, text, tmp_path, data=replace(DATA, seed=1), options=OPTIONS[kind])
    result = fit(None)
    assert result.resumed == 2
    whole = fits[kind].folder
    assert whole is not None
    assert sha256_file(tmp_path / "lens.safetensors") == sha256_file(whole / "lens.safetensors")
    assert result.kl_bits == fits[kind].kl_bits


def test_a_damaged_checkpoint_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "fit.checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(LensError, match="is damaged; remove it"):
        fit_lens("prism", loaded("llama"), text, tmp_path, data=DATA)


def test_low_rank_factors_move_and_the_fit_beats_its_start(text: Path, tmp_path: Path) -> None:
    model = loaded("llama")
    options = TunedOptions(rank=4, start="identity", epochs=2, evaluate_every=4)
    corpus = read_corpus(TextSource(str(text)), model, DATA)
    steps = tuned_module.TunedSteps(model, corpus, DATA, options, "final")
    for index in range(steps.n_steps):
        if index == 1:
            before = {name: t.clone() for name, t in steps.parameters["tuned"].items()}
        steps.step(index)
    for name in ("down", "up"):
        moved = (steps.parameters["tuned"][name] - before[name]).flatten(1).norm(dim=1)
        assert bool((moved > 1e-3).all()), name
    first = steps.history[0]["bits"]["tuned"]
    best = (steps.best_kl["tuned"] / torch.tensor(2.0).log()).tolist()
    assert all(after < start for after, start in zip(best, first, strict=True))


def test_steps_and_evaluations_in_pieces_are_those_of_the_whole(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    corpus = read_corpus(TextSource(str(text)), model, DATA)
    found: list[tuned_module.TunedSteps] = []
    for rows in (1024, 24):  # of 64 a step, and 256 to validate on
        monkeypatch.setattr(tuned_module, "ROWS_AT_ONCE", rows)
        steps = tuned_module.TunedSteps(model, corpus, DATA, TunedOptions(steps=2), "final")
        assert steps.step(0) and steps.step(1)
        found.append(steps)
    whole, pieces = found
    torch.testing.assert_close(pieces.best_kl, whole.best_kl, rtol=1e-4, atol=1e-6)
    first, again = whole.state()[0], pieces.state()[0]
    for name in (name for name in first if name.startswith("first.")):
        torch.testing.assert_close(again[name], first[name], rtol=1e-3, atol=1e-6)


def test_nan_stops_the_fit_and_keeps_the_best(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    real, calls = tuned_module.states_at, []

    def broken(*args: Any) -> Any:
        calls.append(1)
        states = real(*args)
        if len(calls) == 6:
            states.residual[1, 0, 0] = float("nan")
        return states

    monkeypatch.setattr(tuned_module, "states_at", broken)
    options = TunedOptions(start="identity", evaluate_every=1)
    result = fit_lens("tuned", model, text, tmp_path, data=DATA, options=options)
    (line,) = [line for line in result.warnings if "not finite" in line]
    assert "at step 5, row 1" in line
    assert read_details(tmp_path)["stopped"] == line
    assert all(torch.isfinite(t).all() for t in result.lens.tensors().values())
    assert [entry["step"] for entry in result.details["history"]] == [0, 1, 2, 3, 4, 5]


def test_a_prism_of_states_that_are_not_finite_is_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerscope.lenses.fitting import prism

    real = prism.states_at

    def broken(*args: Any) -> Any:
        states = real(*args)
        states.head[0, 0] = float("inf")
        return states

    monkeypatch.setattr(prism, "states_at", broken)
    with pytest.raises(LensError, match="batch 0 are not finite"):
        fit_lens("prism", loaded("llama"), text, data=DATA)


def test_the_jacobian_is_the_sum_over_later_targets_averaged_over_sources(text: Path) -> None:
    model = loaded("llama")
    data = replace(DATA, context=7)
    options = JacobianOptions(sequences=3, skip=2, batch=2)
    corpus = read_corpus(TextSource(str(text)), model, data)
    steps = JacobianSteps(model, corpus, data, options)
    for index in range(steps.n_steps):
        steps.step(index)
    found = steps.tensors()["jacobian"]
    sites = row_sites(model.n_layers)
    expected = torch.zeros_like(found, dtype=torch.float64)
    positions = range(2, 6)
    for ids in corpus.train[:3].long():
        run = model.run(ids[None], capture=sites, logits=None, gradients=True)
        target = run[sites[-1]]
        for layer, site in enumerate(sites[:-1]):
            for coordinate in range(model.d_model):
                for later in positions:
                    (g,) = torch.autograd.grad(
                        target[0, later, coordinate], run[site], retain_graph=True
                    )
                    for source in positions:
                        if later >= source:
                            expected[layer, coordinate] += g[0, source].double()
    expected /= 3 * len(positions)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_text_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": stories(1)[0]}) + "\n", "utf-8")
    with pytest.raises(ConfigError, match=r"too short for the fit: it gives \d+ of 4,096 tokens"):
        fit_lens("tuned", loaded("llama"), path, data=DATA)


def test_options_of_another_lens_are_refused(text: Path) -> None:
    with pytest.raises(ConfigError, match="takes TunedOptions, not PrismOptions"):
        fit_lens("tuned", loaded("llama"), text, options=PrismOptions())
    with pytest.raises(ConfigError, match="did you mean 'prism'"):
        fit_lens("prisms", loaded("llama"), text)  # type: ignore[arg-type]


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    (to / "lens.safetensors").write_bytes((folder / "lens.safetensors").read_bytes())
    stored = json.loads((folder / "lens.json").read_text("utf-8"))
    for name, value in changes.items():
        place = stored
        *path, last = name.split("__")
        for key in path:
            place = place[key]
        place[last] = value
    (to / "lens.json").write_text(json.dumps(stored), "utf-8")
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__d_model": 7}, "the width of the residual stream differs"),
        ({"model__n_layers": 7}, "the number of blocks differs"),
        ({"model__tokenizer_sha256": "ab"}, "the tokenizer differs"),
        ({"model__weights_sha256": "ab"}, "the weights differs"),
        ({"tensors_sha256": "ab"}, "sha256 differs"),
        ({"version": 99}, "no lens of version 1"),
        ({"conventions": {"tuned": "columns"}}, "another convention"),
        ({"norm": "none"}, "incomplete"),
    ],
)
def test_an_artifact_of_something_else_is_refused(
    fits: dict[str, FitResult], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = fits["tuned"].folder
    assert folder is not None
    with pytest.raises(LensError, match=message) as caught:
        load_lens(edited(folder, tmp_path / "edited", **changes), loaded("llama"))
    assert "\n" not in str(caught.value)


def test_another_model_norm_or_kind_is_refused(fits: dict[str, FitResult], tmp_path: Path) -> None:
    folder = fits["tuned"].folder
    assert folder is not None
    with pytest.raises(LensError, match="was fitted to another model"):
        load_lens(folder, loaded("qwen2"))
    with pytest.raises(LensError, match="fitted with norm 'final', not 'next_norm'"):
        load_lens(folder, loaded("llama"), norm="next_norm")
    with pytest.raises(LensError, match="holds no lens 'bais'; did you mean 'bias'"):
        load_lens(folder, loaded("llama"), kind="bais")
    assert load_lens(folder, loaded("llama"), kind="bias").name == "bias"
    with pytest.raises(LensError, match="there is no lens"):
        load_lens(tmp_path, loaded("llama"))


def test_a_transposed_matrix_does_not_give_what_was_stored(
    fits: dict[str, FitResult], tmp_path: Path
) -> None:
    folder = fits["prism"].folder
    assert folder is not None
    other = edited(folder, tmp_path / "other")
    tensors = load_file(other / "lens.safetensors")
    tensors["prism.rotation"] = tensors["prism.rotation"].T.contiguous()
    save_file(tensors, other / "lens.safetensors")
    changed = edited(
        other, tmp_path / "changed", tensors_sha256=sha256_file(other / "lens.safetensors")
    )
    with pytest.raises(LensError, match="does not give what it gave"):
        load_lens(changed, loaded("llama"))


def test_the_layout_of_the_tuned_lens_library_goes_round(
    fits: dict[str, FitResult], tmp_path: Path, text: Path
) -> None:
    model = loaded("llama")
    with pytest.raises(LensError, match="no temperatures"):
        write_tuned_lens(fits["tuned"].lens, tmp_path, model)  # type: ignore[arg-type]
    options = TunedOptions(rank=4, steps=3, baseline=False)
    lens = fit_lens("tuned", model, text, data=DATA, options=options).lens
    write_tuned_lens(lens, tmp_path, model)  # type: ignore[arg-type]
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    # That library: hidden + Linear(hidden), one Linear per row, keys of a ModuleList.
    rows = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(3))
    linear = torch.nn.Linear(model.d_model, model.d_model)
    linear.load_state_dict({"weight": state["1.weight"], "bias": state["1.bias"]})
    theirs = model.norm_at(1, "final")[1](rows + linear(rows)).detach()
    torch.testing.assert_close(lens.transform(rows, 1), theirs, rtol=1e-4, atol=1e-5)
    again = read_tuned_lens(tmp_path, model)
    torch.testing.assert_close(again.transform(rows, 1), theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(LensError, match="holds pickled weights"):
        load_lens(tmp_path, model)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    model = loaded("llama")
    config = {"d_model": model.d_model, "num_hidden_layers": model.n_layers}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "params.pt").write_bytes(pickle.dumps({"0.weight": Harmful()}))
    with pytest.raises(LensError, match=r"params\.pt"):
        read_tuned_lens(tmp_path, model)
    torch.save({"0.weight": Harmful()}, tmp_path / "params.pt")
    with pytest.raises(LensError, match="holds more than tensors"):
        read_tuned_lens(tmp_path, model)
    assert "ran" not in capsys.readouterr().out
    config["d_model"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(LensError, match="d_model is"):
        read_tuned_lens(tmp_path, model)


def test_a_lens_that_is_no_better_than_its_baseline_is_called_so() -> None:
    table = {"prism": [1.0, 2.0, 2.0, 0.5, 0.0], "norm": [9.0, 3.0, 2.0, 0.4, 0.0]}
    verdict = judge("prism", table, ("norm",), 4)
    assert verdict["improves"] is False
    assert [line.split(":")[0] for line in verdict["failures"]] == [
        "prism does not improve on norm at 50% depth (row 2)",
        "prism does not improve on norm at 75% depth (row 3)",
    ]
    nan = judge("prism", {"prism": [float("nan")] * 5, "norm": [1.0] * 5}, ("norm",), 4)
    assert nan["improves"] is False


def test_a_fit_that_gains_nothing_more_ends_early_with_the_best(text: Path) -> None:
    options = TunedOptions(
        start="identity", learning_rate=1e-9, steps=40, evaluate_every=2, patience=3
    )
    seen: list[Progress] = []
    model = loaded("llama")
    result = fit_lens("tuned", model, text, data=DATA, options=options, progress=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].steps == 40 and seen[-1].eta == 0.0
    assert "validation KL tuned" in seen[-1].note
    assert result.kl_bits["tuned"] == pytest.approx(result.kl_bits["norm"], abs=1e-3)
    assert result.verdict["improves"] is False


def test_held_out_kl_in_parts_is_that_of_all_logits(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    states = collect(model, read_corpus(TextSource(str(text)), model, DATA).held_out, DATA)
    monkeypatch.setattr("layerscope.lenses.fitting.evaluate._POSITIONS_AT_ONCE", 100)
    lens = NormLens(model)
    found = kl_bits(model, lens, states)
    log_p = model.unembedding.logits(states.head).double().log_softmax(-1)
    for row, residual in enumerate(states.residual):
        log_q = model.unembedding.logits(lens.transform(residual, row)).double().log_softmax(-1)
        bits = (log_p.exp() * (log_p - log_q)).sum(-1).mean() / math.log(2.0)
        assert found[row] == pytest.approx(float(bits), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere"])
def test_held_out_kl_uses_the_true_head(family: str, text: Path) -> None:
    """Softcap, bias and scale: the norm lens at the last row is the model itself."""
    model = loaded(family)
    corpus = read_corpus(TextSource(str(text)), model, DATA)
    states = collect(model, corpus.held_out[:4], DATA)
    assert kl_bits(model, NormLens(model), states)[-1] == pytest.approx(0.0, abs=1e-5)
    logits = model.run(corpus.held_out[:1].long()).logits
    assert logits is not None
    few = collect(model, corpus.held_out[:4], replace(DATA, evaluation_positions=2))
    assert few.head.shape[0] == 8
    first = collect(model, corpus.held_out[:1], replace(DATA, positions=28))
    rebuilt = model.unembedding.logits(first.head)
    torch.testing.assert_close(rebuilt, logits[0, 4:].detach(), rtol=1e-3, atol=1e-4)
