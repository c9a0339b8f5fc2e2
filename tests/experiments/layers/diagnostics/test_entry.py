from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from layerscope.errors import ConfigError
from layerscope.experiments.layers import LayersConfig, Plan, PromptSet, execute, plan
from layerscope.experiments.layers.diagnostics import SECTIONS, diagnose
from layerscope.experiments.layers.diagnostics.entry import CHECKS
from layerscope.experiments.layers.diagnostics.material import Material, grid_positions
from layerscope.measures.table import LayersTable
from support.diagnosed import FACTS, FEW, demo, material


class Units:
    """A store in memory that is killed after a number of units."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.kept: dict[str, tuple[pl.DataFrame, dict[str, Any]]] = {}
        self.dies_after = dies_after
        self.written = 0

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any]] | None:
        return self.kept.get(key)

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        if self.written == self.dies_after:
            raise KeyboardInterrupt
        self.kept[key] = (frame, json.loads(json.dumps(payload, allow_nan=False)))
        self.written += 1


@pytest.fixture(scope="module")
def run() -> tuple[Plan, LayersTable]:
    planned = plan(demo(), PromptSet("two", FACTS[:2]), LayersConfig(passes_per_batch=1))
    return planned, execute(planned).table


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "layerscope.experiments.layers.diagnostics.entry.Settings"
    monkeypatch.setattr(target, type("Few", (), {"of": staticmethod(lambda level: FEW)}))


def test_every_section_is_a_result_or_has_a_reason(run: tuple[Plan, LayersTable]) -> None:
    seen: list[tuple[int, int]] = []
    planned, table = run
    found = diagnose(
        planned, planned.lenses, table, progress=lambda done, total: seen.append((done, total))
    )
    assert tuple(found) == SECTIONS
    assert seen == [(n, len(SECTIONS)) for n in range(1, len(SECTIONS) + 1)]
    json.dumps(found, allow_nan=False)
    for name, section in found.items():
        if section["status"] == "skipped":
            assert section["reason"], name
            continue
        assert section["status"] == "ok", name
        undecided = [gate for gate, holds in section["gates"].items() if holds is None]
        assert not undecided or section["warnings"], name
    skipped = {name for name, section in found.items() if section["status"] == "skipped"}
    assert skipped == {"tuned_audit", "tuned_attribution", "prism_summary", "tau_norm_per_layer"}


@pytest.mark.parametrize("dies_after", [0, 6])
def test_killed_and_resumed_equals_uninterrupted(
    run: tuple[Plan, LayersTable], dies_after: int
) -> None:
    planned, table = run
    whole = diagnose(planned, planned.lenses, table)
    units = Units(dies_after)
    with pytest.raises(KeyboardInterrupt):
        diagnose(planned, planned.lenses, table, units=units)
    units.dies_after = None
    resumed = diagnose(planned, planned.lenses, table, units=units)
    assert units.written == len(SECTIONS)
    assert json.dumps(resumed) == json.dumps(whole)


def test_kept_sections_are_not_made_again(
    run: tuple[Plan, LayersTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, table = run
    units = Units()
    first = diagnose(planned, planned.lenses, table, units=units)

    def fails(_: Material) -> dict[str, Any]:
        raise AssertionError("made again")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, fails)
    assert diagnose(planned, planned.lenses, table, units=units) == first


def test_an_unknown_level_is_refused(
    run: tuple[Plan, LayersTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    planned, table = run
    with pytest.raises(ConfigError, match="did you mean 'full'"):
        diagnose(planned, planned.lenses, table, level="ful")


def test_facts_come_first_and_memory_bounds_the_passes() -> None:
    builtin = PromptSet.builtin()
    planned = plan(demo(), builtin)
    table = execute(planned).table
    lenses = {lens.name: lens for lens in planned.lenses}
    whole = Material(planned, lenses, table, FEW)
    variants = [item.source.variant for item in whole.passes]
    assert variants[:5] == ["orig"] * 5 and whole.left_out == 11 - 8
    assert all(item.source.prompt_id == "pos" for item in whole.passes)
    small = plan(demo(), builtin, LayersConfig(batch_bytes=1))
    assert len(Material(small, lenses, table, FEW).passes) == 1


def test_one_capture_serves_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = material(demo())
    calls = 0
    honest = run._capture

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return honest(*args)

    monkeypatch.setattr(run, "_capture", counted)
    for name in ("normalization_provenance", "head_transforms", "decoding_point", "unembed_bias"):
        CHECKS[name](run)
    assert calls == 1


def test_the_grid_names_every_position_once_and_ends_at_the_last() -> None:
    assert grid_positions(101) == [20, 40, 60, 80, 92, 96, 98, 100]
    assert grid_positions(3) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert grid_positions(1) == [0] * 8
