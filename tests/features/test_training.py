"""The trainer recovers planted directions, resumes to the same bytes, stores what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted

from layerscope.errors import ConfigError, DictionaryError, LensError
from layerscope.features import load, open_set
from layerscope.features.figures import collect, loss_recovered, measure
from layerscope.features.training import Trainer, TrainOptions, train_dictionaries
from layerscope.models import Replace, Site, TokenBatch
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


@pytest.mark.parametrize("affine", [False, True])
def test_a_planted_mlp_is_learned(affine: bool) -> None:
    """It reads some directions and writes others; a skip takes what is linear beside them."""
    p, out = planted(n=24, d=32, rows=6_000), planted(n=24, d=32, rows=1, seed=1)
    y = 2 * p.values @ out.directions + 3.0
    generator = torch.Generator().manual_seed(7)
    linear = 0.5 * torch.randn(32, 32, generator=generator, dtype=torch.float64) * affine
    y = y + p.x @ linear.T
    options = planted_options("batchtopk", transcoder=True, affine=affine, steps=700)
    trainer = Trainer(p.x.float(), Site("mlp_in", 1), options, y=y.float())
    for index in range(trainer.n_steps):
        trainer.step(index)
    dictionary = trainer.dictionary()
    assert (dictionary.reads, dictionary.writes) == (Site("mlp_in", 1), (Site("mlp_out", 1),))
    assert (dictionary.skip is not None) == affine
    found = measure(dictionary, p.x[:2_000].float(), y[:2_000].float())
    assert found.fvu < 0.05 and 2 < found.l0 < 5, found
    if not affine:  # a skip may take a part of the planted map as well
        learned = dictionary.write_directions(range(48)).double()
        best = (learned @ out.directions.T).amax(dim=0)
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


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_is_stored_as_it_was_trained(affine: bool, tmp_path: Path) -> None:
    """What is stored, read back and spliced in gives the figures that lie beside it."""
    held_out, site, target = batches(2), Site("mlp_in", 1), Site("mlp_out", 1)
    options = small(transcoder=True, affine=affine)
    (one,) = train_dictionaries(MODEL, batches(1), held_out, [site], tmp_path, options=options)
    stored = load(one.folder)
    assert (stored.reads, stored.writes) == (site, (target,))
    found = collect(MODEL, held_out, [site, target])
    assert one.figures["fvu"] == measure(stored, found[site], found[target]).fvu
    trainer = Trainer(
        collect(MODEL, batches(1), [site])[site], site, options,
        y=collect(MODEL, batches(1), [target])[target],
    )  # fmt: skip
    for index in range(options.steps):
        trainer.step(index)
    made = trainer.dictionary().reconstruct(found[site])
    torch.testing.assert_close(stored.reconstruct(found[site]), made)
    # The loss with the MLP's output replaced, by hand.
    ids = held_out[0]
    x = MODEL.run(ids, capture=site, logits=None)[site]
    kept = MODEL.run(ids, capture=target, logits=None)[target]
    spliced = torch.cat([kept[:, :1], stored.reconstruct(x)[:, 1:]], dim=1)
    logits = MODEL.run(ids, edits=[Replace(target, spliced)]).logits
    assert logits is not None
    by_hand = torch.nn.functional.cross_entropy(
        logits[:, 1:-1].flatten(0, 1), ids.ids[:, 2:].flatten()
    )
    loss = loss_recovered(MODEL, stored, held_out[:1])
    assert loss["reconstructed"] == pytest.approx(float(by_hand), rel=1e-5)


def test_options_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="mlp_in"):
        train_dictionaries(MODEL, [], [], [HERE], "nowhere", options=TrainOptions(transcoder=True))
    with pytest.raises(ConfigError, match="only a transcoder"):
        TrainOptions(affine=True)
    with pytest.raises(DictionaryError, match="as many activations"):
        Trainer(torch.randn(64, 4), Site("mlp_in", 0), TrainOptions(transcoder=True, batch=32))
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
