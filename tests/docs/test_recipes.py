"""The recipes and the page on follow-ups run as written, and each control stays behind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from support.shared import REPOSITORY

DOCS = REPOSITORY / "docs"


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def execute(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__docs__"}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + source, page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    return execute("recipes.md")


def test_induction_heads_copy_and_random_ones_do_not(recipes: dict[str, Any]) -> None:
    assert set(recipes["found"]) == {(2, 0), (2, 1)}
    assert recipes["cut"].drop > 5 * max(recipes["cut"].control_drops)


def test_sentiment_moves_along_the_direction_only(recipes: dict[str, Any]) -> None:
    curve, control = recipes["curve"], recipes["control"]
    values = [curve[alpha] for alpha in sorted(curve)]
    assert values == sorted(values)
    reach = values[-1] - values[0]
    spans = [abs(b - a) for a, b in zip(control[-0.4], control[0.4], strict=True)]
    assert reach > 2 * max(spans)


def test_the_vector_beats_random_heads(recipes: dict[str, Any]) -> None:
    zero = recipes["antonyms"].summary["test_top1"]["zero_shot"]
    assert zero["vector"] > max(zero["none"], zero["random_mean"]) + 0.3


def test_binding_and_two_hops_are_measured_against_their_controls(recipes: dict[str, Any]) -> None:
    right, wrong = recipes["bound"]
    assert right > wrong + 0.3
    moved, gap = recipes["moved"], recipes["gap"]
    things = [moved[0, name] / gap for name in ("first thing", "second thing")]
    assert min(things) > 0.1 and abs(moved[0, "second person"]) < 1e-4 * gap
    assert moved[recipes["model"].n_layers - 1, "end"] / gap > 0.3
    shares = {name: float(share) for name, share in recipes["shares"].items()}
    # The page says that each hop is done and both together are not.
    assert min(shares["country to currency"], shares["capital to country"]) > 0.6
    assert shares["both at once"] < 0.4


def test_the_end_carries_the_person_and_points_nowhere(recipes: dict[str, Any]) -> None:
    binding, top = recipes["binding"], recipes["model"].n_layers - 1
    for way in ("place", "name"):
        assert binding[way, "resid_pre.0", "A"] == 1.0
        assert binding[way, f"resid_pre.{top}", "its own"] > 0.8
        pointed = [share for (w, _, who), share in binding.items() if (w, who) == (way, "B")]
        assert max(pointed) < 0.3
        for _, site, _ in binding:
            assert sum(binding[way, site, who] for who in ("A", "B", "its own")) <= 1 + 1e-6


def test_the_first_hop_is_written_down_above_a_word_as_frequent(recipes: dict[str, Any]) -> None:
    grid, top = recipes["grid"], recipes["model"].n_layers - 1
    for (what, _, place), (gain, low, high) in grid.items():
        assert low <= gain <= high
        if (what, place) == ("country", "is"):  # nobody can know the country yet
            assert low < 0 < high
    for place in ("is (after)", "the (end)"):
        assert grid["country", 1, place][1] < 0 < 1.5 < grid["country", 3, place][1]
        assert grid["currency", 1, place][1] < 0.5 < grid["currency", top, place][1]
    for ids, others in recipes["sought"].values():
        assert not bool((ids == others).any())


def test_two_people_are_told_apart_and_of_three_the_last(recipes: dict[str, Any]) -> None:
    two, three = (recipes["told_apart"][count].tolist() for count in (2, 3))
    assert min(two) > 0.2
    assert three[2] > 0.3 > 0.25 > max(three[:2])


def test_a_word_found_in_english_is_said_in_spanish_at_a_price(recipes: dict[str, Any]) -> None:
    assert len(recipes["asked"]) >= 20 and max(recipes["errors"].values()) < 0.1
    transfer, damage, top = recipes["transfer"], recipes["damage"], recipes["model"].n_layers - 1
    for language in ("English", "Spanish"):
        assert transfer["resid_post.1", "swap", language][0] < 0.1
        share, low, high = transfer["resid_post.3", "swap", language]
        assert low <= share <= high and low > 0.7
    for (_, name, _), (share, _, _) in transfer.items():
        if name == "random":
            assert share < 0.1
    spanish = [transfer[f"resid_post.{layer}", "swap", "Spanish"][0] for layer in (4, top)]
    assert spanish[1] < spanish[0]
    assert damage["resid_post.3", "swap"][0] > damage["resid_post.3", "random"][0] > 0.0


def test_the_page_on_follow_ups_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = execute("follow-up.md")["found"]
    items = found.tables["items"]
    assert items.height >= 5 and set(items["causal"]) == {3} == set(items["onset_attn_out"])
    assert found.summary["onsets"]["all"]["control"]["share"] == 0.0
    ((_, command),) = blocks("follow-up.md", "console")
    words = [str(model_path()) if word == "MODEL" else word for word in shlex.split(command)]
    assert run(words[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "facts followed up" in said and "left out, not_answered" in said
    assert (tmp_path / "layerscope-runs" / "run-latest" / "report.html").is_file()
