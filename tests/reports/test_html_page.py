"""The page as a browser gets it: offline, small, escaped, and plain about what is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.errors import OutputError
from layerscope.measures.table import LayersTable
from layerscope.reports.html import layers_page, write_html
from layerscope.reports.text import visible
from support.summaries import many_passes, small_summary, with_tokens
from support.tables import synthetic_table

EVIL = [
    "<script>document.title='owned'</script>",
    "</script>",
    "&lt;b&gt;",
    '"onmouseover=',
    "\n",
    "\t",
    "\u2028",
    "\u200f\u202eabc",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "[red]",
    " שלום",
    "",
]
MAX_BYTES_BEYOND_PLOTLY = 2_000_000


class Page(HTMLParser):
    """Collects elements, their attributes, and the text of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or "own"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["layers-data"])

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def page_of(table: LayersTable, summary: dict[str, Any] | None = None) -> str:
    return layers_page((table, summary or small_summary(table), {"seed": 1}))


def without_plotly(text: str) -> str:
    start = text.index('<script id="plotly-js">')
    return text[:start] + text[text.index("</script>", start) :]


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(n_layers=6, n_facts=2)


@pytest.fixture(scope="module")
def text(table: LayersTable) -> str:
    return page_of(table)


def test_nothing_is_loaded_from_outside(text: str) -> None:
    page = Page(text)
    own = without_plotly(text)
    assert not re.search(r"(https?:)?//[\w.-]+\.\w", own)
    assert "@import" not in own
    assert "url(" not in own
    assert not page.names() & {"link", "img", "iframe", "object", "embed", "base"}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_plotly_is_inlined_once_even_for_two_models(table: LayersTable) -> None:
    report = (table, small_summary(table), {})
    text = layers_page([report, report])
    assert text.count('<script id="plotly-js">') == 1
    page = Page(text)
    assert len(page.data["models"]) == 2
    assert sum(tag == "article" for tag, _ in page.tags) == 2


def test_data_block_holds_every_pass_and_lens(table: LayersTable, text: str) -> None:
    model = Page(text).data["models"][0]
    assert [entry["index"] for entry in model["passes"]] == [0, 1, 2, 3, 4]
    first = model["passes"][0]
    grid = first["lenses"]["norm"]["grid"]
    assert len(grid["t"]) == len(grid["layers"]) * len(grid["pos"]) * grid["k"]
    rows = table.rows.filter((pl.col("prompt_index") == 0) & (pl.col("lens") == "norm"))
    row = rows.filter((pl.col("layer") == 4) & (pl.col("pos") == 2)).row(0, named=True)
    cell = 4 * len(grid["pos"]) + 2
    assert model["strings"][grid["t"][cell * grid["k"]]] == visible(row["top_tokens"][0])
    assert grid["p"][cell * grid["k"]] == pytest.approx(row["top_probs"][0], rel=1e-3)
    assert grid["h"][cell] == pytest.approx(row["entropy_bits"], rel=1e-3)
    assert grid["r"][cell] == row["final_top1_rank"]


def test_ablation_and_control_stand_beside_a_fact(text: str) -> None:
    passes = Page(text).data["models"][0]["passes"]
    assert passes[0]["beside"] == {"ablation": 1, "control": 4}
    assert passes[3]["beside"] == {"fact": 2, "control": 4}
    assert passes[4]["beside"] == {"fact": 0, "ablation": 1}
    assert passes[0]["absent"]["beside"] == []


def test_malicious_tokens_stay_text(table: LayersTable, text: str) -> None:
    evil = with_tokens(table, EVIL)
    summary = small_summary(evil)
    summary["measurement_guidance"]["reasons"][0]["message"] = EVIL[8]
    page = Page(layers_page((evil, summary, {"note": EVIL[0], EVIL[1]: EVIL[8]})))
    assert page.names() == Page(text).names()
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert page.data["models"][0]["passes"][0]["text"].startswith(EVIL[0])
    assert {visible(token) for token in EVIL[:10]} <= set(page.data["models"][0]["strings"])
    assert EVIL[8] in page.text
    block = page.scripts["layers-data"]
    assert not set("<>&\u2028\u2029") & set(block)
    handlers = {name for _, a in page.tags for name in a if name.startswith("on")}
    assert handlers == {"onsubmit"}


@pytest.mark.parametrize("count", [60, 200])
def test_many_prompts_keep_the_page_small(count: int) -> None:
    many = many_passes(synthetic_table(n_layers=12, n_facts=1), count)
    text = page_of(many)
    assert len(without_plotly(text).encode()) < MAX_BYTES_BEYOND_PLOTLY
    passes = Page(text).data["models"][0]["passes"]
    assert len(passes) == count
    assert all("grid" in lens for entry in passes for lens in entry["lenses"].values())


def test_a_deep_model_with_many_prompts_says_what_it_leaves_out() -> None:
    many = many_passes(synthetic_table(n_layers=80, n_facts=1), 120)
    text = page_of(many)
    assert len(without_plotly(text).encode()) < MAX_BYTES_BEYOND_PLOTLY
    page = Page(text)
    shown = page.data["models"][0]["passes"]
    assert len(shown) < 120
    said = " ".join(page.text)
    assert f"shows the first {len(shown)} of 120 prompts" in said
    assert "The grid is drawn for the first" in said
    drawn = ["grid" in entry["lenses"]["norm"] for entry in shown]
    assert drawn[0]
    assert not drawn[-1]
    assert "grid" in shown[-1]["absent"]


def test_one_lens_alone_says_why_nothing_is_compared() -> None:
    table = synthetic_table(n_layers=4, n_facts=1, lenses=("norm",))
    first = Page(page_of(table)).data["models"][0]["passes"][0]
    assert "not both in this table" in first["absent"]["raw"]


def test_missing_columns_and_companions_are_explained(table: LayersTable) -> None:
    fact = table.meta.prompts[0]
    bare = replace(
        fact, head=None, last_rows=(), answer=None, answer_pieces=(), alignment_status="no answer"
    )
    empty = ("entropy_bits", "kl_to_final_bits", "answer_rank", "kl_norm_vs_raw_bits")
    empty += ("js_norm_raw_bits", "topk_jaccard_raw_norm")
    rows = table.rows.filter(pl.col("prompt_index") == 0).drop(empty)
    summary = {"n_layers": 6, "passes": [], "measurement_guidance": {}}
    page = Page(layers_page((LayersTable(rows, replace(table.meta, prompts=(bare,))), summary, {})))
    absent = page.data["models"][0]["passes"][0]["absent"]
    assert set(absent) == {"beside", "entropy", "kl", "rank", "raw", "head"}
    assert absent["rank"].endswith("no answer.")
    assert len(absent["beside"]) == 2
    said = " ".join(page.text)
    assert "No prompt was measured." in said
    assert "holds no measurement guidance" in said
    assert "No fact was measured" in said
    assert "no comparison of the raw and the norm lens over all layers" in said


def test_top_tokens_may_be_absent(table: LayersTable) -> None:
    rows = table.rows.drop("top_ids", "top_tokens", "top_probs")
    grid = Page(page_of(LayersTable(rows, table.meta))).data["models"][0]["passes"][0]["lenses"]
    assert grid["norm"]["grid"]["k"] == 0


def test_header_says_what_was_read_and_how_far_to_trust_it(text: str) -> None:
    said = " ".join("".join(Page(text).text).split())
    assert "“Berlin” becomes the top prediction at layer" in said
    assert "trust: medium" in said
    assert "Confirm the onset with a second lens" in said
    assert "Germany→Berlin over all layers: artefact tier medium (score 0.42 of 1)." in said


def test_nothing_to_report_is_an_error() -> None:
    with pytest.raises(OutputError, match="nothing to report"):
        layers_page([])


def test_page_is_written_whole(tmp_path: Path, table: LayersTable, text: str) -> None:
    path = write_html(tmp_path / "deep" / "page.html", (table, small_summary(table), {"seed": 1}))
    assert path.read_text(encoding="utf-8") == text
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium or chrome on the path to open the page with")


@pytest.mark.slow
def test_a_browser_draws_the_page_without_errors(tmp_path: Path, table: LayersTable) -> None:
    program = browser()
    evil = with_tokens(table, EVIL)
    path = write_html(tmp_path / "page.html", (evil, small_summary(evil), {}))
    done = subprocess.run(
        [
            program,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400"),
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--virtual-time-budget=6000", "--enable-logging=stderr", "--dump-dom"),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    cells = [a for tag, a in page.tags if tag == "td" and "tabindex" in a]
    assert len(cells) == 7 * len(evil.meta.prompts[0].tokens)
    assert sum("main-svg" in (a.get("class") or "") for _, a in page.tags) >= 2
    small = [a for tag, a in page.tags if tag == "button" and "data-at" in a]
    facts = [p for p in evil.meta.prompts if (p.prompt_id, p.prompt_variant) == ("pos", "orig")]
    assert len(small) == len(facts)
    assert [a["aria-pressed"] for a in small].count("true") == 1
    assert "<title>owned" not in done.stdout
    assert not any(tag == "img" for tag, _ in page.tags)
