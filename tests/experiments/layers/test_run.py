from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import layerscope
from layerscope.errors import AlignmentError, ConfigError, PromptError
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.measures.table import LayersTable
from layerscope.models import LanguageModel
from support.memory_units import Units
from support.tiny_models import tiny, tiny_tokenizer

FACTS = tuple(
    Fact(key=f"k{n}", prompt=f"{'very ' * (n % 4)}long ago number {n} was", answer="here")
    for n in range(9)
)
PROMPTS = PromptSet("nine", FACTS)
CONFIG = LayersConfig(passes_per_batch=2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())


def table_bytes(table: LayersTable, path: Path) -> bytes:
    table.write_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("dies_after", [0, 1, 3])
def test_killed_and_resumed_equals_uninterrupted(
    model: LanguageModel, tmp_path: Path, dies_after: int
) -> None:
    whole = execute(plan(model, PROMPTS, CONFIG))
    units = Units(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        execute(plan(model, PROMPTS, CONFIG), units=units)
    units.dies_after = None
    resumed = execute(plan(model, PROMPTS, CONFIG), units=units)
    assert units.written == len(plan(model, PROMPTS, CONFIG).units) + 1  # and the temperatures
    assert resumed.summary == whole.summary
    expected = table_bytes(whole.table, tmp_path / "whole.parquet")
    assert table_bytes(resumed.table, tmp_path / "resumed.parquet") == expected


def test_units_of_another_configuration_are_not_reused(model: LanguageModel) -> None:
    units = Units()
    execute(plan(model, PROMPTS, CONFIG), units=units)
    before = units.written
    other = LayersConfig(passes_per_batch=2, norm_choice="next_norm")
    execute(plan(model, PROMPTS, other), units=units)
    assert units.written == 2 * before


def test_a_whole_grid_is_one_forward_and_a_repeated_one_is_none(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[Any] = []
    real = model.backend.execute

    def count(request: Any) -> Any:
        forwards.append(request)
        return real(request)

    monkeypatch.setattr(model.backend, "execute", count)
    units = Units()
    planned = plan(model, PROMPTS, LayersConfig())
    assert len(planned.units) == 1  # nine prompts, all layers, all positions, all lenses
    first = execute(planned, units=units)
    # The temperatures of the norm lens are fitted in a pass of their own, before the grid.
    assert planned.calibration is not None and len(forwards) == 2
    again = execute(plan(model, PROMPTS, LayersConfig()), units=units)
    assert len(forwards) == 2 and again.summary == first.summary
    forwards.clear()
    raw = plan(model, PROMPTS, LayersConfig(lenses=("raw",)))
    assert raw.calibration is None
    execute(raw)
    assert len(forwards) == 1


def test_progress_counts_passes_to_the_end(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    execute(plan(model, PROMPTS, CONFIG), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_library_call_takes_mappings_and_gives_milestones(model: LanguageModel) -> None:
    result = layerscope.analyze(
        model, [{"key": "a", "prompt": "one two", "answer": "three"}], CONFIG
    )
    table = result.milestones()
    assert table.height == 2  # one pass, two lenses
    assert set(table["lens"]) == {"raw", "norm"}
    assert result.provenance["readout_products"]["precision"]
    assert result.provenance["config"]["passes_per_batch"] == 2


def test_one_lens_alone(model: LanguageModel) -> None:
    for lens in ("raw", "norm"):
        result = layerscope.analyze(model, PROMPTS, LayersConfig(lenses=(lens,)))
        assert result.table.lenses == [lens]
        assert result.summary["measurement_guidance"]["reasons"] is not None


def test_bad_prompts_are_refused_before_any_work(model: LanguageModel) -> None:
    units = Units()
    long = Fact(key="long", prompt="word " * 2000, answer="x")
    with pytest.raises(PromptError, match="'long'"):
        execute(plan(model, PromptSet("p", (long,)), CONFIG), units=units)
    inside = Fact(key="inside", prompt="The capital of Germany is Ber", answer="lin")
    try:
        plan(model, PromptSet("p", (inside,)), CONFIG)
    except AlignmentError as error:
        assert "'inside'" in str(error)
    assert units.written == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lenses": ("nrom",)}, "did you mean 'norm'"),
        ({"lenses": ()}, "at least one"),
        ({"lenses": ("raw", "raw")}, "once"),
        ({"norm_choice": "finale"}, "did you mean 'final'"),
        ({"top_k": 4}, "top_k must be at least 5"),
        ({"format": "caht"}, "did you mean 'chat'"),
        ({"format": "raw", "system": "Be brief."}, "system belongs to a chat"),
        ({"readout_bytes": 0}, "readout_bytes must be at least 1"),
    ],
)
def test_bad_configuration(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LayersConfig(**options)


def test_records_with_an_unknown_column_are_refused(model: LanguageModel) -> None:
    with pytest.raises(PromptError, match="did you mean 'answer'"):
        layerscope.analyze(model, [{"key": "a", "prompt": "one", "anwser": "two"}])
