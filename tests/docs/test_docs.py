"""The documentation runs as written, names everything that exists, and links to what is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from layerscope import demo
from layerscope.cli.app import build, run
from layerscope.measures import guidance_rules
from layerscope.measures.config import MeasureConfig
from layerscope.measures.table import ROW_SCHEMA
from layerscope.models import templates
from layerscope.models.identities import STATEMENTS
from support.shared import REPOSITORY
from support.tiny_models import tiny, tiny_tokenizer

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
# Made by `make docs` and from the demo's page; a missing one is skipped with this reason.


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded model, or a tiny random one while its weights are absent."""
    if (demo.model_path() / "model.safetensors").exists():
        return demo.model_path()
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with `model_path()` answering the model of these tests."""
    monkeypatch.setattr(demo, "model_path", lambda: model_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, text) of the fenced blocks of one language."""
    text = document.read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def execute(document: Path) -> dict[str, Any]:
    """Run a page's Python blocks in one namespace; errors name the page and its line."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for line, source in blocks(document, "python"):
        exec(compile("\n" * line + source, str(document), "exec"), namespace)
    return namespace


def test_the_first_look_runs_as_written(
    workplace: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = execute(DOCS / "first-look.md")
    assert names["result"].table.rows["prompt_index"].n_unique() == 11
    assert names["moved"] > 0
    assert {entry["fact_key"] for entry in names["mine"].summary["passes"]} == {
        "spain",
        "japan",
        None,
    }
    commands = [
        line for _, block in blocks(DOCS / "first-look.md", "console") for line in block.split("\n")
    ]
    capsys.readouterr()
    for command in filter(None, commands):
        program, *words = shlex.split(command)
        assert program == "layerscope"
        words = [str(model_folder) if word == "MODEL" else word for word in words]
        assert run(words) == 0, f"{command}: {capsys.readouterr().err}"
    assert (workplace / "towns.zip").is_file()
    assert (workplace / "towns" / "run-latest" / "report.html").is_file()


def test_the_page_on_models_runs_as_written(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = execute(DOCS / "models.md")
    said = capsys.readouterr().out
    assert "is refused: embedding" in said
    assert "did you mean 'resid_post.1'" in said
    assert "attn.0.pattern" in said
    assert names["hook"].id not in names["module"].get_input_embeddings()._forward_hooks


def test_the_page_on_templates_runs_as_written(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_registered", {})
    names = execute(DOCS / "templates.md")
    said = capsys.readouterr().out
    assert "a chat prompt for a base model (its tokenizer has no chat template)" in said
    assert "Q: big\nA: small\n\nQ: up\nA:" in said
    assert names["info"].format == "chat" and names["info"].template == "completion/1"


def test_every_template_is_listed() -> None:
    text = (DOCS / "templates.md").read_text("utf-8")
    assert [row.id for row in templates.templates() if f"| `{row.id}` |" not in text] == []


def test_every_block_is_of_a_language_that_is_run() -> None:
    for name in ("first-look.md", "models.md", "templates.md"):
        fences = re.findall(r"^```(\S*)$", (DOCS / name).read_text("utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "console"}, name
        assert set(fences[1::2]) <= {""}, name


def named(text: str) -> set[str]:
    """Return what a page writes in code: whole spans, and the words in them."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return set(spans) | {word for span in spans for word in re.split(r"[^\w.]+", span)}


@pytest.fixture(scope="module")
def definitions() -> set[str]:
    return named((DOCS / "definitions.md").read_text("utf-8"))


def test_every_column_of_the_table_has_its_line() -> None:
    text = (DOCS / "definitions.md").read_text("utf-8")
    section = text.split("\n## The table\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(ROW_SCHEMA)


def test_every_identity_is_explained() -> None:
    text = (DOCS / "models.md").read_text("utf-8")
    assert [name for name in STATEMENTS if f"| `{name}` |" not in text] == []


def test_every_threshold_is_defined(definitions: set[str]) -> None:
    fields = [field.name for field in dataclasses.fields(MeasureConfig)]
    assert [name for name in fields if name not in definitions] == []


def test_the_thresholds_written_are_the_defaults() -> None:
    text = (DOCS / "definitions.md").read_text("utf-8")
    # A number, a few words at most, and the field in brackets: 1 bit (`entropy_collapse_bits`).
    written = re.findall(r"(\d+(?:\.\d+)?)[^()\d|]{0,30}\(`(\w+)`", text)
    defaults = dataclasses.asdict(MeasureConfig())
    checked = {name: float(value) for value, name in written if name in defaults}
    assert len(checked) >= 25
    wrong = {
        name: value
        for name, value in checked.items()
        if value not in (known if isinstance(known := defaults[name], tuple) else (known,))
    }
    assert wrong == {}


def codes() -> Iterator[str]:
    """Yield the code of every reason that the rules can give."""
    for node in ast.walk(ast.parse(inspect.getsource(guidance_rules))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Reason":
            code = node.args[0]
            assert isinstance(code, ast.Constant), "a reason's code is written out"
            yield code.value


def test_every_guidance_code_is_defined_and_no_other() -> None:
    text = (DOCS / "definitions.md").read_text("utf-8")
    table = text.split("\n## Guidance\n")[1].split("\n\n| Field |")[0]
    assert sorted(set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))) == sorted(set(codes()))


def test_every_milestone_is_defined(definitions: set[str], workplace: Path) -> None:
    import layerscope

    facts = [{"key": "a", "prompt": "The capital of France is", "answer": "Paris"}]
    result = layerscope.analyze(str(demo.model_path()), facts)
    text = (DOCS / "definitions.md").read_text("utf-8")
    # Members of a series are written by their ending: `first_rank_le_1`, `_5`, `_10`.
    endings = set(re.findall(r"`(_\w[\w.]*)`", text))
    missing = [
        name
        for name in result.summary["passes"][0]["milestones"]
        if name not in definitions
        and "@" not in name
        and not any(name.endswith(ending) for ending in endings)
    ]
    assert missing == []
    assert "L_copy_strict@τ" in text


def commands(command: Any, path: str = "layerscope") -> Iterator[str]:
    """Yield every command with its path."""
    for name, child in getattr(command, "commands", {}).items():
        yield from (
            commands(child, f"{path} {name}") if hasattr(child, "commands") else [f"{path} {name}"]
        )


def test_every_command_is_named() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    text = " ".join(text.split())
    every = list(commands(typer.main.get_command(build())))
    assert "layerscope runs list" in every
    assert [command for command in every if command not in text] == []


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("page", "target"), list(links()), ids=lambda value: getattr(value, "name", value)
)
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    found = (page.parent / name).resolve() if name else page
    assert found.exists(), f"{page.name} links to {target}"
    if anchor:
        assert anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme_or_another_page() -> None:
    reached = {(page.parent / target.partition("#")[0]).resolve() for page, target in links()}
    assert [page.name for page in PAGES[1:] if page not in reached] == []
