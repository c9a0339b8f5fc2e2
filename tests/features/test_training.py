"""The trainer recovers planted directions, resumes to the same bytes, stores what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted

from layerscope.errors import ConfigError, DictionaryError, LensError
from layerscope.features import load, open_set
from layerscope.features.figures import collect, measure
from layerscope.features.training import Trainer, TrainOptions, train_dictionaries
from layerscope.models import Site, TokenBatch
from support.loaded import loaded

HERE = Site("resid_post", 1)
MODEL = loaded("llama")


def planted_options(kind: Any, **more: Any) -> TrainOptions:
    given: dict[str, Any] = {
        "kind": kind, "expansion": 1.5, "k": 3, "steps": 500, "batch": 256,
        "learning_rate": 5e-3, "dead_after": 5_000, "seed": 3,
    }  # fmt: skip
    return TrainOptions(**{**given, **more})


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_planted_directions_are_recovered(kind: str) -> None:
    p = planted(n=24, d=32, rows=6_000)
    trainer = Trainer(p.x.float(), HERE, planted_options(kind))
    for index in range(trainer.n_steps):
        trainer.step(index)
    dictionary = trainer.dictionary()
    found = measure(dictionary, p.x[:2_000].float())
    assert found.fvu < 0.05 and 2 < found.l0 < 5, found
    learned = dictionary.write_directions(range(48)).double()
    torch.testing.assert_close(learned.norm(dim=1), torch.ones(48, dtype=torch.float64))
    best = (learned @ p.directions.T).amax(dim=0)
    assert float((best > 0.95).double().mean()) > 0.85, best


def test_a_dead_feature_comes_back() -> None:
    p = planted(n=24, d=32, rows=4_000)
    dead: dict[float, float] = {}
    for weight in (0.0, 1.0):
        options = planted_options("batchtopk", steps=250, revive=weight or 1e-12, dead_after=2_000)
        trainer = Trainer(p.x.float(), HERE, options)
        trainer.parameters["W_enc"][:40] *= 1e-3  # never among the largest
        for index in range(options.steps):
            trainer.step(index)
        dead[weight] = float((trainer.silent[:40] > 2_000).double().mean())
    assert dead[0.0] == 1.0 and dead[1.0] < 0.6


def batches(seed: int, n: int = 12, length: int = 24) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 300, (n, length), generator=generator).tolist()
    return [TokenBatch.from_ids(rows[first : first + 4]) for first in range(0, n, 4)]


def small(**more: Any) -> TrainOptions:
    return TrainOptions(expansion=2, k=4, steps=12, batch=32, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    sites = [Site("resid_post", 0), Site("mlp_out", 1)]
    arguments = (MODEL, batches(1), batches(2), sites)
    train_dictionaries(*arguments, tmp_path / "whole", options=small())

    class Stop(Exception):
        pass

    def stop(site: Site, state: Any) -> None:
        if site.kind == "mlp_out" and state.step == 7:
            raise Stop

    for options in ({"progress": stop}, {}):
        try:
            done = train_dictionaries(
                *arguments, tmp_path / "parts", options=small(), checkpoint_seconds=0, **options
            )
        except Stop:
            assert any(
                p.name.endswith("checkpoint.safetensors") for p in (tmp_path / "parts").rglob("*")
            )
    assert [one.resumed for one in done] == [0, 7]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # Given again, nothing is done; of other settings, it is refused.
    again = train_dictionaries(*arguments, tmp_path / "parts", options=small())
    assert [one.figures for one in again] == [one.figures for one in done]
    with pytest.raises(DictionaryError, match="another run"):
        train_dictionaries(*arguments, tmp_path / "parts", options=small(seed=1))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    def stop(site: Site, state: Any) -> None:
        if state.step == 3:
            raise KeyboardInterrupt

    for seed, error in ((0, KeyboardInterrupt), (1, LensError)):
        with pytest.raises(error):
            train_dictionaries(
                MODEL, batches(1), batches(2), [HERE], tmp_path,
                options=small(seed=seed), progress=stop, checkpoint_seconds=0,
            )  # fmt: skip


def test_what_is_stored_is_what_was_measured(tmp_path: Path) -> None:
    held_out = batches(2)
    (one,) = train_dictionaries(
        MODEL, batches(1), held_out, [HERE], tmp_path, options=small(), store_dtype=torch.float16
    )
    stored = load(one.folder)
    x = collect(MODEL, held_out, [HERE])[HERE]
    found = measure(stored, x)
    assert len(x) == 12 * 23  # the first position of every row is left out
    assert one.figures["fvu"] == found.fvu and one.figures["l0"] == found.l0
    assert stored.facts["expected_l0"] == found.l0 and stored.facts["skip"] == 1
    loss = one.figures["loss"]
    recovered = (loss["zero"] - loss["reconstructed"]) / (loss["zero"] - loss["clean"])
    assert loss["recovered"] == pytest.approx(recovered)
    assert open_set(tmp_path).layers == (1,)


def test_options_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="unknown kind"):
        TrainOptions(kind="topk")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps is 0"):
        TrainOptions(steps=0)
    with pytest.raises(ConfigError, match="cannot hold k"):
        Trainer(torch.randn(64, 4), HERE, TrainOptions(expansion=1, k=8, batch=32))
    with pytest.raises(DictionaryError, match="fewer than one batch"):
        Trainer(torch.randn(8, 4), HERE, TrainOptions())
    with pytest.raises(DictionaryError, match="not finite"):
        Trainer(torch.full((2000, 4), float("nan")), HERE, TrainOptions())
