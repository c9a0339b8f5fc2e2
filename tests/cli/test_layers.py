"""`layerscope layers` as a user runs it, on tiny random models in folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import layerscope
from layerscope.cli.app import run
from layerscope.measures.table import LayersTable
from layerscope.store import Store
from support.chat_templates import GEMMA, chat_tokenizer
from support.lens_artifacts import stored
from support.tiny_models import tiny, tiny_tokenizer

PROMPTS = "key,prompt,answer\na,One and two and,three\nb,Red and,blue\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def layers(*words: object) -> int:
    return run(["layers", *(str(word) for word in words)])


def test_run_writes_files_store_page_and_json(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert layers(folder, "--prompts", prompts, "--out", out, "--json") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["status"] == "finished"
    for name in ("L_copy", "L_semantic", "first_kl_below_0.5", "first_rank_le_5"):
        assert name in answer
    latest = out / "run-latest"
    assert (latest / "report.html").stat().st_size > 100_000
    table = LayersTable.read_parquet(latest / "output-tiny-llama-layers.parquet")
    assert table.rows["prompt_index"].n_unique() == 2
    assert json.loads((latest / "output-tiny-llama.json").read_text())["schema_version"]
    with Store.open(out / "layerscope.db") as store:
        (info,) = store.runs()
        assert info.status == "finished"
    for path in answer["models"][0]["files"]:
        assert Path(path).exists()


def test_other_text_in_the_same_file_is_another_run(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    ids: list[str] = []
    for words in ("one two three four five ", "red and blue and one "):
        text.write_text(words * 20)
        assert layers(folder, "--prompts", prompts, "--text", text, "--out", out, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        section = answer["summary"]["diagnostics"]["skip_layers_sanity"]
        assert section["text"]["source"] == str(text)
        ids.append(answer["run_id"])
    with Store.open(out / "layerscope.db") as store:
        configs = [store.run(run_id).config for run_id in ids]
    assert configs[0]["text_sha256"] != configs[1]["text_sha256"]


def test_terminal_summary_is_plain_text_in_a_pipe(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert layers(folder, "--prompts", prompts, "--out", tmp_path / "out", "--no-html") == 0
    captured = capsys.readouterr()
    assert "\x1b[" not in captured.out
    assert "run-latest" in captured.out
    assert captured.err == ""
    assert not (tmp_path / "out" / "run-latest" / "report.html").exists()


def test_second_run_keeps_the_first(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert layers(folder, "--prompts", prompts, "--out", out, "--no-html") == 0
    kept = sorted(path.name for path in out.glob("run-*"))
    assert len(kept) == 2 and "run-latest" in kept
    tables = [path.read_bytes() for path in out.glob("run-*/output-tiny-llama-layers.parquet")]
    assert tables[0] == tables[1]


def test_failure_of_one_model_is_a_status(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ("--prompts", prompts, "--out", out, "--no-html", "--json")
    assert layers(broken, folder, *words) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [entry["status"] for entry in answer["models"]] == ["failed", "finished"]
    record = json.loads((out / "run-latest" / "output-broken.json").read_text())
    assert record["status"] == "failed" and record["error"]
    assert (out / "run-latest" / "output-tiny-llama.json").exists()


def test_prompts_that_cannot_be_asked_are_left_out_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed, out = tmp_path / "mixed.csv", tmp_path / "out"
    mixed.write_text(PROMPTS + "<inside>,two ,three\n", encoding="utf-8")
    words = (folder, "--prompts", mixed, "--diagnostics", "none", "--out", out)
    assert layers(*words, "--json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{folder}: 1 of 3 prompts left out")
    assert captured.err.count("\n") == 1
    answer = json.loads(captured.out)
    assert answer["status"] == "finished"
    (left,) = answer["summary"]["prompts"]["left_out"]
    assert (left["prompt"], left["stage"]) == ("<inside>", "alignment")
    assert answer["provenance"]["prompts"]["left_out"] == [left]
    latest = out / "run-latest"
    record = json.loads((latest / "output-tiny-llama.json").read_text())
    assert record["prompts"]["left_out"] == [left] and record["prompts"]["given"] == 3
    page = (latest / "report.html").read_text("utf-8")
    assert "1 of 3 prompts left out:" in page and "&lt;inside&gt; (orig)" in page
    assert "drop the whitespace at the end of the prompt" in page
    assert layers(*words, "--no-html") == 2
    said = capsys.readouterr().out
    assert "1 of 3 prompts left out:\n  <inside> (orig): the answer starts inside a token" in said


def test_interruption_keeps_finished_work_and_goes_on(
    folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from layerscope.cli import sweep

    out = tmp_path / "out"
    words = (folder, "--prompts", prompts, "--out", out, "--no-html")
    real = sweep.write_run_files

    def interrupted(*_: object) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "write_run_files", interrupted)
    assert layers(*words) == 130
    assert capsys.readouterr().err.count("interrupted; finished work is kept") == 1
    monkeypatch.setattr(sweep, "write_run_files", real)
    assert layers(*words) == 0
    assert [path.name for path in out.glob("run-*")] == ["run-latest"]
    with Store.open(out / "layerscope.db") as store:
        (info,) = store.runs()
        assert info.status == "finished"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{tmp}/nothing-here"], "nothing-here"),
        (["{model}", "--lens", "nrom"], "did you mean 'norm'"),
        (["{model}", "--norm", "fin"], "use final or next_norm"),
        (["{model}", "--prompts", "{tmp}/none.csv"], "does not exist"),
        (["{model}", "--dtype", "float33"], "float32"),
        (["{model}", "--products", "fast"], "use default or checked"),
        (["{model}", "--format", "caht"], "did you mean 'chat'"),
        (["{model}", "--format", "chat"], "a chat prompt for a base model (its tokenizer has no"),
        (["{model}", "--instruct"], "instruct=True needs a chat template"),
        (["{model}", "--system", "Be brief."], "system belongs to a chat"),
        (["{model}", "--task", "qaa"], "unknown task 'qaa'; did you mean 'qa'"),
        (["{model}", "{model}"], "named twice"),
        (["{model}", "--lenz", "raw"], "No such option"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    out = tmp_path / "out"
    filled = [word.format(model=folder, tmp=tmp_path) for word in words]
    assert layers(*filled, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert not list(out.glob("run-*"))


def test_an_instruct_model_is_asked_in_its_own_chat(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chatty, out = tmp_path / "tiny-llama-instruct", tmp_path / "out"
    shutil.copytree(folder, chatty)
    chat_tokenizer(GEMMA).save_pretrained(chatty)
    assert layers(folder, chatty, "--prompts", prompts, "--out", out, "--no-html") == 0
    said = capsys.readouterr().out
    assert "prompt format: raw (its tokenizer has no chat template)" in said
    assert "prompt format: chat (it has a chat template and its name says 'instruct')" in said
    tables = {
        name: LayersTable.read_parquet(out / "run-latest" / f"output-{name}-layers.parquet")
        for name in ("tiny-llama", "tiny-llama-instruct")
    }
    formats = {name: {info.format for info in table.passes()} for name, table in tables.items()}
    assert formats == {"tiny-llama": {"raw"}, "tiny-llama-instruct": {"chat"}}
    record = json.loads((out / "run-latest" / "output-tiny-llama-instruct.json").read_text())
    hashes = [info.prompt_sha256 for info in tables["tiny-llama-instruct"].passes()]
    assert {entry["prompt_sha256"] for entry in record["passes"]} == set(hashes)
    assert record["provenance"]["prompts"]["format"] == "chat"
    assert layers(chatty, "--base", "--prompts", prompts, "--out", out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["provenance"]["prompts"]["format_reason"] == "instruct=False was given"
    assert "prompt format" in (out / "run-latest" / "report.html").read_text("utf-8")
    assert layers(chatty, "--format", "raw", "--prompts", prompts, "--out", out, "--no-html") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: raw text for an instruct model")
    assert captured.err.count("\n") == 1
    assert "prompt format: raw (format='raw' was asked for)" in captured.out


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--debug", "layers", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failed_model_is_in_the_database_too(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--prompts", prompts, "--out", out, "--no-html")
    assert layers(folder, tmp_path / "missing", *words) == 2
    assert "missing" in capsys.readouterr().err
    with Store.open(out / "layerscope.db") as store:
        assert sorted(info.status for info in store.runs()) == ["failed", "finished"]


def test_fitted_lenses_from_folders(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = stored("tuned", layerscope.load(folder), tmp_path / "my-lens", noise=0.1)
    words = (folder, "--prompts", prompts, "--out", tmp_path / "out")
    assert layers(*words, "--lens", f"raw,norm,tuned={tuned}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["summary"]["lenses"] == ["norm", "raw", "tuned"]
    assert answer["summary"]["tuned_lens"]["status"] == "ok"
    assert answer["provenance"]["lenses"]["tuned"]["folder"] == str(tuned)
    assert layers(*words, "--lens", f"raw,norm,tuned={tuned}") == 0
    text = capsys.readouterr().out
    assert "Lens against lens" in text and "tuned" in text


@pytest.mark.parametrize(
    ("lens", "says"),
    [
        ("raw,norm,prism", "layerscope fit prism"),
        ("raw,norm,prism=", "--lens prism= names no folder"),
        ("raw,norm,tuned=nowhere", "there is no lens in nowhere"),
        ("raw,norm,tunde", "did you mean 'tuned'"),
        ("raw=x", "folders belong to"),
    ],
)
def test_a_lens_that_cannot_be_had_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lens: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert layers(folder, "--lens", lens, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error.replace("\n", " ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_another_lens_in_the_same_folder_is_another_run(
    folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, place = layerscope.load(folder), tmp_path / "my-lens"
    words = (folder, "--prompts", prompts, "--out", tmp_path / "out", "--json")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    def found() -> dict[str, Any]:
        assert layers(*words, "--lens", f"norm,tuned={place}") == 0
        return json.loads(capsys.readouterr().out)

    stored("tuned", model, place, noise=0.1)
    with monkeypatch.context() as patch:  # finished, but its folder was not
        patch.setattr("layerscope.cli.sweep.close_run_dir", killed)
        assert layers(*words, "--lens", f"norm,tuned={place}") == 130
    capsys.readouterr()
    with Store.open(tmp_path / "out" / "layerscope.db") as store:
        (first,) = store.runs()
        before = store.result(first.id, "summary")
    stored("tuned", model, place, noise=0.9)
    after = found()
    assert after["run_id"] != first.id
    assert after["summary"]["lens_comparison"] != before["lens_comparison"]
