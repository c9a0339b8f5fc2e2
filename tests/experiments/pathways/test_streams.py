"""Records stream: whatever the file's form, and however it is cut."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from layerscope.experiments.pathways import streams
from layerscope.experiments.pathways.streams import RecordStream, StreamError

RECORDS: list[Any] = [{"a": 'größe ✓ \\ " ]', "n": -1.5e3}, [1, [2]], 3, "x", None, True, {}]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize("ascii", [True, False])
def test_every_form_gives_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascii: bool
) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    text = json.dumps(RECORDS, ensure_ascii=ascii, indent=1)
    plain, held, lines = (tmp_path / name for name in ("a.json", "b.json", "c.jsonl"))
    plain.write_text(f" {text}\n", encoding="utf-8")
    held.write_text(f'{{"timestamp": 12345, "results": {text}, "last": [1]}}', encoding="utf-8")
    joined = "\n".join(json.dumps(each, ensure_ascii=ascii) for each in RECORDS)
    lines.write_text(joined, encoding="utf-8")
    assert list(RecordStream(plain)) == RECORDS
    stream = RecordStream(held)
    assert list(stream) == RECORDS
    assert stream.fields == {"timestamp": 12345, "last": [1]}
    assert list(RecordStream(lines)) == RECORDS


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_cut_file_says_where(tmp_path: Path, cut: int) -> None:
    text = json.dumps([{"ü": n} for n in range(4)], ensure_ascii=False)
    path = tmp_path / "cut.json"
    data = text.encode()[:-cut]
    path.write_bytes(data)
    if not data:
        return
    seen: list[Any] = []
    with pytest.raises(StreamError) as caught:
        seen.extend(RecordStream(path))
    assert 0 <= caught.value.offset <= len(data)


@pytest.mark.parametrize("text", ["[1, 2] 3", '{"results": [1] "a": 2}', "7", "[1 2]", "{3: 4}"])
def test_what_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(StreamError):
        list(RecordStream(path))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    record = json.dumps({"response": "x" * 1000})
    path.write_text("[" + ",".join([record] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in RecordStream(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8e6
