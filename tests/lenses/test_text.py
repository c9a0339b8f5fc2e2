"""Where text comes from, and how it is packed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import polars as pl
import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.lenses.fitting.corpus import DataConfig, batch_at, read_corpus
from layerscope.lenses.fitting.text import TextSource
from layerscope.models.prompts import encode_plain
from support.loaded import loaded

STORIES = [f"Story number {index} is about the capital of France, Paris." for index in range(300)]
DATA = DataConfig(tokens=1024, evaluation_tokens=256, context=32, positions=4, batch=4)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lines = jsonl(tmp_path / "a.jsonl", STORIES)
    pl.DataFrame({"text": STORIES}).write_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": STORIES}).save_to_disk(str(tmp_path / "folder"))
    for location in (lines, tmp_path / "a.parquet", tmp_path / "folder"):
        assert list(TextSource(str(location)).documents()) == STORIES


def test_a_plain_file_is_cut_into_pieces_that_add_up(tmp_path: Path) -> None:
    whole = "\n\n".join(STORIES) + "\r\nlast, without an end"
    path = tmp_path / "a.txt"
    path.write_text(whole, "utf-8", newline="")
    pieces = list(TextSource(str(path)).documents())
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    long_line = tmp_path / "b.txt"
    long_line.write_text("word " * 20_000, "utf-8")
    assert len(list(TextSource(str(long_line)).documents())) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 of .* has no field 'text'; did you mean 'txt'"),
        (b'{"text": "a"}\nnot json\n', "line 2 of .* is not JSON"),
        (b'{"text": 3}\n', "holds a int, not text"),
        (b'["a"]\n', "is not a record"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        list(TextSource(str(path)).documents())
    assert "\n" not in str(caught.value)


def test_a_broken_parquet_file_or_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        list(TextSource(str(tmp_path / "a.parquet")).documents())
    pl.DataFrame({"story": STORIES}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="it has story"):
        list(TextSource(str(tmp_path / "b.parquet")).documents())
    assert list(TextSource(str(tmp_path / "b.parquet"), field="story").documents()) == STORIES


def test_sequences_begin_as_texts_do_and_no_document_is_in_two_splits(tmp_path: Path) -> None:
    model = loaded("llama")
    twice = STORIES + STORIES
    corpus = read_corpus(TextSource(str(jsonl(tmp_path / "a.jsonl", twice))), model, DATA)
    bos = model.tokenizer.bos_token_id
    assert corpus.train.shape == (32, 32)
    for split in (corpus.train, corpus.validation, corpus.held_out):
        assert bool((split[:, 0] == bos).all())
    numbers = [
        {
            number
            for number in range(300)
            if f"number {number} is" in model.tokenizer.decode(split.flatten().tolist())
        }
        for split in (corpus.train, corpus.validation, corpus.held_out)
    ]
    assert all(numbers)
    assert not numbers[0] & numbers[1] and not numbers[0] & numbers[2]
    assert not numbers[1] & numbers[2]


def test_running_text_of_a_plain_file_is_joined_by_nothing(tmp_path: Path) -> None:
    model = loaded("llama")
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(STORIES * 3), "utf-8")
    data = replace(DATA, tokens=512, evaluation_tokens=64)
    corpus = read_corpus(TextSource(str(path)), model, data)
    bos = model.tokenizer.bos_token_id
    assert int((corpus.train == bos).sum()) == len(corpus.train)
    first = next(iter(TextSource(str(path)).documents()))
    ids = torch.tensor(encode_plain(model.tokenizer, first)[0][:31], dtype=torch.int32)
    splits = torch.cat([corpus.train, corpus.validation, corpus.held_out])
    assert any(torch.equal(row[1:], ids) for row in splits)


def test_the_same_text_and_seed_give_the_same_sequences_and_positions(tmp_path: Path) -> None:
    model = loaded("llama")
    source = TextSource(str(jsonl(tmp_path / "a.jsonl", STORIES)))
    one, two = read_corpus(source, model, DATA), read_corpus(source, model, DATA)
    assert torch.equal(one.train, two.train)
    assert one.sha256 == two.sha256
    other = replace(DATA, seed=1)
    assert read_corpus(source, model, other).sha256 != one.sha256
    assert batch_at(one.train, DATA, 2)[1] == batch_at(one.train, DATA, 2)[1]
    assert batch_at(one.train, DATA, 2)[1] != batch_at(one.train, DATA, 2, epoch=1)[1]
    assert batch_at(one.train, DATA, 2)[1] != batch_at(one.train, other, 2)[1]
    # A sequence's positions do not depend on how sequences are batched.
    assert batch_at(one.train, DATA, 2)[1] == batch_at(one.train, replace(DATA, batch=12), 0)[1][8:]
    for chosen in batch_at(one.train, DATA, 0)[1]:
        assert len(set(chosen)) == 4 and min(chosen) >= DATA.skip and max(chosen) < 32


def test_contexts_beyond_the_model_are_refused(tmp_path: Path) -> None:
    source = TextSource(str(jsonl(tmp_path / "a.jsonl", STORIES)))
    with pytest.raises(ConfigError, match="beyond the model's"):
        read_corpus(source, loaded("llama"), replace(DATA, context=10**6))
    with pytest.raises(ConfigError, match="leaves nothing after skip"):
        read_corpus(source, loaded("llama"), replace(DATA, context=4))
    with pytest.raises(ConfigError, match="tokens is 0"):
        DataConfig(tokens=0)


def test_the_embedded_models_own_kind_of_text_is_the_same_every_time() -> None:
    train, validation = TextSource("layerscope-demo"), TextSource("layerscope-demo", split="test")
    assert train.kind == "demo" and not train.continuous
    one, again, other = (list(islice(s.documents(), 200)) for s in (train, train, validation))
    assert one == again and all(text.strip() for text in one)
    assert len(set(one) & set(other)) < 20
