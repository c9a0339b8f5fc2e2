"""The whole pipeline on the embedded model: skipped, stopped, killed and resumed, cut otherwise."""

from __future__ import annotations

import ast
import json
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from benchmarks.kill_pathways import run_killed
from polars.testing import assert_frame_equal

import layerscope
from layerscope import demo
from layerscope.cli.app import run as command
from layerscope.errors import ConfigError
from layerscope.experiments.pathways import (
    NAMES,
    Workspace,
    open_results,
    orchestrate,
    read_config,
    run_all,
    run_stage,
)
from layerscope.experiments.pathways import discover as discover_module
from layerscope.experiments.pathways import replay as replay_module
from layerscope.experiments.pathways import tokens as tokens_module
from layerscope.experiments.pathways.manifest import MANIFEST
from layerscope.features import open_set
from layerscope.models import LanguageModel
from support.pathways_data import checkpoint, log, responses, result

pytestmark = pytest.mark.skipif(
    not (demo.model_path() / "model.safetensors").exists(), reason="the embedded model is absent"
)

PROMPTS = (
    "Balance: $40. Bet: $5-$100. Last spins: win, loss, loss. Options: 1) bet 2) stop. Decision:",
    "Balance: $90. Bet: fixed $10. Last spins: win, win, loss. Options: 1) bet 2) stop. Decision:",
)
CHANGED = (
    "top_n_per_layer",
    "top_k_pathways",
    "permutations",
    "drivers",
    "nulls",
    "batch_size",
)
# What a run writes that is the same however it came about; records of time are left out.
TIMED = {"run.json", "results/prototype/single_feature_test.json"}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(demo.model_path(), device="cpu")


@pytest.fixture(scope="module")
def data(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write causal features that are active at the end of the first prompt, and their responses."""
    folder = tmp_path_factory.mktemp("data")
    dictionaries = open_set(demo.dictionaries_path(), layers=[1, 2])
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        stream = model.run(PROMPTS[0], capture=["resid_post.1", "resid_post.2"], logits=None)
        for layer in (1, 2):
            values = dictionaries[layer].encode(stream[f"resid_post.{layer}"][0, -1])
            for rank, feature in enumerate(values.topk(3).indices.tolist()):
                records.append(result(layer, feature, (-1) ** rank * (1.0 + rank)))
    space = open_set(demo.dictionaries_path()).space.name
    checkpoint(folder, records, space=space, model="layerscope-demo")
    log(folder, responses([record["feature"] for record in records]))
    prompts = [{"id": f"p{n}", "text": text, "origin": "test"} for n, text in enumerate(PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    return folder


@pytest.fixture
def work(data: Path, model: LanguageModel, tmp_path: Path) -> Any:
    """Return a function that opens a run with some options changed."""

    def open_run(name: str = "out", **options: Any) -> Workspace:
        given: dict[str, Any] = {
            "data": str(data),
            "model": str(demo.model_path()),
            "dictionaries": str(demo.dictionaries_path()),
            "top_n_per_layer": 2,
            "top_k_pathways": 4,
            "permutations": 60,
            "drivers": 1,
            "nulls": 2,
            "batch_size": 2,
        }
        return Workspace(read_config(None, **{**given, **options}), tmp_path / name, model=model)

    return open_run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if name not in TIMED and not name.startswith(MANIFEST)
    }


def test_from_raw_data_to_the_graph(work: Any) -> None:
    code, done = run_all(work())
    assert code <= 1, {name: run.record.notes for name, run in done.items()}
    assert list(done) == list(NAMES)
    found = open_results(work().out)
    assert found.audit is not None and found.audit["validated"]
    assert found.causal is not None and found.edges is not None and found.summary is not None
    sizes = [(f["layer"], abs(f["cohen_d"])) for f in found.causal["features"]]
    assert sizes == [(1, 3.0), (1, 2.0), (2, 3.0), (2, 2.0)]  # by |d|, signs kept
    targets = {(f["layer"], f["feature_id"]) for f in found.causal["features"]}
    edges = found.edges
    assert set(edges.select("target_layer", "target_id").iter_rows()) <= targets
    assert edges.height <= 4 * 2 * 4 and (edges["source_layer"] < edges["target_layer"]).all()
    assert edges["verdict"].is_in(["confirmed", "nonlinear", "refuted", "undetermined"]).all()
    # Every edge is replayed, and the null edit at dose 1 of nothing is not among them.
    assert found.doses is not None and found.doses.height == edges.height * 4
    assert found.summary.height == 4
    assert {"top_in", "edges_in", "strength_in"} <= set(found.summary.columns)
    assert found.prompts is not None
    assert [prompt["bos"] for prompt in found.prompts["prompts"]] == [1, 1]
    assert found.tokens is not None
    assert {"q", "lift", "logodds_z", "corpus"} <= set(found.tokens.columns)
    assert found.words is not None and "token_id" not in found.words.columns
    assert {"stop", "keep", "safe_baseline"} & set(found.words["word"])
    assert found.words["q"].null_count() == 0
    stages = found.run["stages"]
    assert all(stages[name]["seconds"] > 0 for name in NAMES)
    assert all(stages[name]["peak_memory_bytes"] > 0 for name in NAMES)
    check_graphs(work().out, edges)
    check_fresh_stages(work)


def check_graphs(out: Path, edges: pl.DataFrame) -> None:
    """The graph has supported edges alone; the viewer's file has all that its schema asks for."""
    folder = out / "results/integrated"
    graph = json.loads((folder / "graph.json").read_text())
    names = {node["id"] for node in graph["nodes"]}
    assert all(edge["source"] in names and edge["target"] in names for edge in graph["edges"])
    assert all(edge["verdict"] in ("confirmed", "nonlinear") for edge in graph["edges"])
    tree = ElementTree.parse(folder / "graph.graphml").getroot()
    space = "{http://graphml.graphdrawing.org/xmlns}"
    assert len(tree.findall(f".//{space}node")) == len(graph["nodes"])
    assert len(tree.findall(f".//{space}edge")) == len(graph["edges"])
    viewer = json.loads((folder / "neuronpedia/000-p0.json").read_text())
    assert set(viewer) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt"} <= set(viewer["metadata"])
    ids = {node["node_id"] for node in viewer["nodes"]}
    supported = edges.filter(
        (pl.col("prompt_id") == "p0") & pl.col("verdict").is_in(["confirmed", "nonlinear"])
    )
    assert len(viewer["links"]) == supported.height
    for link in viewer["links"]:
        assert {link["source"], link["target"]} <= ids
    for node in viewer["nodes"]:
        layer, feature, position = map(int, node["node_id"].split("_"))
        assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
        assert 0 <= position < len(viewer["metadata"]["prompt_tokens"])


def check_fresh_stages(work: Any) -> None:
    """Fresh stages are skipped; a changed option redoes what depends on it, and nothing else."""
    _, done = run_all(work())
    assert all(run.skipped for run in done.values())
    _, done = run_all(work(nulls=3))
    redone = [name for name, run in done.items() if not run.skipped]
    assert redone == ["replay", "integrate"]
    output = work().path("results/pathways/discovered.parquet")
    output.write_bytes(output.read_bytes() + b" ")  # touched by somebody
    assert not run_stage(work(), "discover").skipped


class _Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Count what chunks do; let one of them die when told to."""
    state: dict[str, Any] = {"discover": 0, "replay": 0, "encode": 0, "die": None}

    def watch(module: Any, name: str, label: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            state[label] += 1
            if state["die"] == (label, state[label]):
                raise _Killed
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(discover_module, "discover", "discover")
    watch(replay_module, "replay", "replay")
    watch(tokens_module.Encoder, "encode", "encode")
    monkeypatch.setattr(tokens_module, "_TEXTS", 40)
    yield state


def test_killed_and_resumed_gives_the_same_bytes(work: Any, counted: dict[str, Any]) -> None:
    run_all(work("whole"))
    stages = ("discover", "replay", "encode")
    whole = {stage: counted[stage] for stage in stages}
    assert min(whole.values()) >= 3
    counted.update(dict.fromkeys(stages, 0))
    for stage in stages:
        counted["die"] = (stage, 3)
        with pytest.raises(_Killed):
            run_all(work("killed"))
    counted["die"] = None
    run_all(work("killed"))
    # Every chunk was done once, and those that died were begun once more.
    assert {stage: counted[stage] - 1 for stage in stages} == whole
    assert contents(work("killed").out) == contents(work("whole").out)


def test_a_killed_process_is_gone_on_with(work: Any) -> None:
    """SIGKILL between a chunk's rows and the note that makes them count; see kill_pathways."""
    stages = NAMES[: NAMES.index("tokens")]
    run_all(work("whole", device="cpu"), stages=stages)
    run = work("killed", device="cpu")
    changed = [f"--set={name}={run.config.part((name,))[name]}" for name in CHANGED]
    named = ("data", "model", "dictionaries")
    paths = [f"--{name}={getattr(run.config, name)}" for name in named]
    ended = run_killed(
        ["pathways", "run", *paths, *changed, f"--out={run.out}", "--device=cpu"],
        moment=2,
        at=".chunks/replay",
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = [path for path in run.out.rglob("*") if path.parent.name == "replay"]
    assert [path.suffix for path in left if path.suffix != ".layerscope-tmp"] == [".parquet"]
    run_all(run, stages=stages)
    assert contents(run.out) == contents(work("whole").out)


def test_the_result_does_not_depend_on_the_batch(work: Any) -> None:
    stages = ("audit", "select", "discover", "replay")
    run_all(work("one", batch_size=1), stages=stages)
    run_all(work("all", batch_size=64), stages=stages)
    one, every = (open_results(work(name).out) for name in ("one", "all"))
    assert one.edges is not None and every.edges is not None
    assert_frame_equal(one.edges, every.edges, rel_tol=1e-4, abs_tol=1e-5)


def test_a_failed_audit_stops_the_run(work: Any, data: Path) -> None:
    cut = data / "checkpoint_L9.json"
    cut.write_text('{"results": [')
    try:
        code, done = run_all(work("stopped"))
        assert code == 2 and list(done) == ["audit"]
        with pytest.raises(ConfigError, match="audit failed"):
            run_stage(work("stopped"), "select")
    finally:
        cut.unlink()
    with pytest.raises(ConfigError, match="layerscope pathways audit"):
        run_stage(work("nothing"), "select")


def test_source_compat_keeps_earlier_rules_and_names(work: Any) -> None:
    run = work("compat", source_compat=True)
    assert (run.config.positions, run.config.gradient_threshold) == ("last", 0.1)
    run_all(run)
    found = open_results(run.out)
    assert found.edges is not None
    assert (found.edges["source_position"] == found.edges["target_position"]).all()
    assert (found.edges["gradient"].abs() > 0.1).all()
    assert (found.edges["source_layer"] > 0).all()
    named = json.loads((run.out / "results/pathways/validated_pathways.json").read_text())
    assert len(named["pathways"]) == found.edges.height


def test_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "pathways.yaml"
    config.write_text(
        f"data: {data}\nmodel: {demo.model_path()}\ndictionaries: {demo.dictionaries_path()}\n"
    )
    shared = ["--config", str(config), "--out", str(tmp_path / "run"), "--json"]
    assert command(["pathways", "run", *shared, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert not (tmp_path / "run").exists()
    assert command(["pathways", "audit", *shared]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["audit"]["exit_code"] == 0
    assert command(["pathways", "audit", *shared, "--set", "min_trials=50"]) == 1
    capsys.readouterr()
    assert command(["pathways", "audit", *shared, "--data", str(tmp_path)]) == 2
    capsys.readouterr()
    assert command(["pathways", "select", *shared]) == 2
    assert "audit failed" in capsys.readouterr().err


def test_sources_neither_print_nor_assert() -> None:
    for path in Path(orchestrate.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"
