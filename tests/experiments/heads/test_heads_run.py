"""The heads experiment: its verdict, its page, and trained models without induction heads."""

from __future__ import annotations

import json

import pytest

import layerscope
from layerscope.cli.app import run as layerscope_cli
from layerscope.demo import model_path
from layerscope.errors import ConfigError
from layerscope.experiments.heads import HeadsConfig, heads
from layerscope.reports.heads import write_heads
from support.shared import shared_path


@pytest.fixture(scope="module")
def model():
    return layerscope.load(model_path(), device="cpu", dtype="float32")


def test_the_embedded_model(model, tmp_path) -> None:
    outcome = heads(model, HeadsConfig(sequences=4))
    summary = outcome.summary
    assert set(summary["induction_heads"]) == {"2.0", "2.1"}
    assert summary["ablation"]["ratio"] > 5
    assert summary["top"]["copying"][0]["head"] in ("2.0", "2.1")
    assert outcome.tables["ablation"].height == 2 + 10
    found = {(row["first"], row["second"]): row for row in summary["agreement"]}
    assert len(found) == 3 and found["direct", "drop_alone"]["shared"] >= 2
    assert all(-1 <= row["spearman"] <= 1 for row in found.values())
    page = write_heads(outcome, tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "Do the measures agree?" in page
    assert "Attention heads of layerscope-demo" in page
    assert "Induction heads: 2.1, 2.0" in page or "Induction heads: 2.0, 2.1" in page


def test_the_same_seed_gives_the_same_tables(model) -> None:
    first, again = (heads(model, HeadsConfig(sequences=2, controls=2)) for _ in range(2))
    assert all(first.tables[name].equals(table) for name, table in again.tables.items())
    other = heads(model, HeadsConfig(sequences=2, controls=2, seed=1))
    assert not other.tables["heads"].equals(first.tables["heads"])


def test_resampling_finds_the_same_heads_to_matter_and_needs_another_sequence(model) -> None:
    outcome = heads(model, HeadsConfig(sequences=3, controls=2, kind="resample"))
    assert outcome.summary["ablation"]["ratio"] > 5
    strongest = [row["head"] for row in outcome.summary["top"]["drop_alone"][:4]]
    assert {"2.0", "2.1"} & set(strongest)
    with pytest.raises(ConfigError, match="use 2 sequences or more"):
        HeadsConfig(sequences=1, kind="resample")


def test_nothing_to_ablate_is_said(model) -> None:
    settings = HeadsConfig(sequences=2, threshold=1.0, alone=False)
    whole = heads(model, settings)
    assert "drop_alone" not in whole.tables["heads"].columns
    skipped = whole.summary["ablation"]
    assert skipped["status"] == "skipped" and "no head reaches" in skipped["reason"]
    with pytest.raises(ConfigError, match="above 0, at most 1"):
        HeadsConfig(threshold=0.0)


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = layerscope_cli(
        ["heads", str(model_path()), "--sequences", "2", "--controls", "2", "--json"]
    )
    assert code == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written["summary"]["induction_heads"]) == {"2.0", "2.1"}
    assert (tmp_path / "layerscope-runs").exists() and written["report"].endswith("report.html")


PAIRS = """
- {key: a, answer: Paris, foil: Tokyo,
   clean: The capital of France is called, corrupt: The capital of Japan is called}
- {key: b, answer: Madrid, foil: Rome,
   clean: The capital of Spain is called, corrupt: The capital of Italy is called}
"""


@pytest.mark.parametrize("command", ("attribute", "mediate"))
def test_commands_on_pairs(command: str, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.yaml").write_text(PAIRS, encoding="utf-8")
    words = [command, str(model_path()), "--pairs", "pairs.yaml"]
    assert layerscope_cli([*words, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["summary"]["total_effect"] < -5
    assert layerscope_cli(words) == 0
    assert "2 of 2 pairs" in capsys.readouterr().out
    assert layerscope_cli([*words, "--metric", "rank"]) == 2
    assert "unknown metric 'rank'" in capsys.readouterr().err


@pytest.mark.real_model
@pytest.mark.parametrize("name", ("stories260K", "babyllama-tok105"))
def test_small_trained_models_do_not_copy_random_tokens(name: str) -> None:
    model = layerscope.load(shared_path("models", name), device="cpu", dtype="float32")
    summary = heads(model).summary
    assert summary["induction_heads"] == [] and summary["ablation"]["status"] == "skipped"
    strongest = summary["top"]["previous_token"][0]["score"]
    assert strongest > 3 * summary["uniform"]["previous_token"]
