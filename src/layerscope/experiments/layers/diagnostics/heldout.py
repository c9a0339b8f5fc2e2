"""Held-out text for the checks that need many tokens: a given file, a page of prose, or samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerscope.errors import PromptError
from layerscope.lenses.fitting.text import TextSource
from layerscope.models import TokenBatch
from layerscope.models.prompts import encode_plain, leading_specials

if TYPE_CHECKING:
    from layerscope.experiments.layers.diagnostics.material import Material

_COVERED = 0.95  # of the characters of the built-in text must survive the tokenizer
_READABLE = 0.75  # of the bits of a uniform guess, at most, for a text the model reads at all
_SHORTEST = 4  # tokens of a sequence worth scoring
_ROWS = 8  # sequences sampled at once

Sequences = list[tuple[int, ...]]


@dataclass(frozen=True)
class HeldOut:
    """Token sequences to score, in batches.

    Attributes:
        batches: of token ids; the sequences of a batch run together.
        source: "built-in", "samples", or the file.
        notes: what a reader must know of the choice, one line each.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(len(sequence) for batch in self.batches for sequence in batch)


def held_out(material: Material) -> HeldOut:
    """Return sequences that fit the model's context and the run's memory.

    A given file is taken as it is. The built-in prose is used where the tokenizer can write it and
    the model reads it (fewer than 75% of the bits of a uniform guess): a lens cannot be judged on
    text that says nothing to the model. Otherwise the model continues the run's own prompts, drawn
    at temperature 1.

    Raises:
        ConfigError: a given file cannot be read.
    """
    model, settings = material.model, material.settings
    fits = max(2 * _SHORTEST, material.config.batch_bytes // material.bytes_per_token)
    length = min(settings.text_length, model.n_ctx or settings.text_length, fits)
    notes: list[str] = []
    if material.text is not None:
        source = material.text
        sequences = _cut(material, _source(source).documents(), length)
        notes += _seen(material, source)
        if (bits := _bits(material, sequences)) > _most_bits(material):
            notes.append(
                f"the model spends {bits:.1f} bits on a token of {source}, hardly fewer than on a "
                "guess: what a lens makes of that text means little"
            )
    else:
        source, sequences = "built-in", Sequences()
        reason = _unwritable(material)
        if not reason:
            sequences = _cut(material, iter([_builtin()]), length)
            reason = _unreadable(material, sequences)
        if reason:
            source, sequences = "samples", _samples(material, length)
            notes.append(f"{reason}; it was replaced by the model's own continuations of prompts")
    size = max(1, fits // length)
    batches = [tuple(sequences[at : at + size]) for at in range(0, len(sequences), size)]
    return HeldOut(tuple(batches), source, tuple(notes))


def _source(location: str) -> TextSource:
    source = TextSource(location)
    return replace(source, split="validation") if source.kind == "demo" else source


def _seen(material: Material, source: str) -> list[str]:
    """Say which lenses were fitted on this very file."""
    path = Path(source)
    if not path.is_file():
        return []
    seen: list[str] = []
    for name, facts in material.table.meta.lenses.items():
        corpus: Any = facts.get("corpus") or {}
        location = str(corpus.get("location") or "")
        if location and Path(location).is_file() and Path(location).samefile(path):
            seen.append(name)
    if not seen:
        return []
    return [f"{source} is what {', '.join(seen)} was fitted on, which flatters it; give other text"]


def _cut(material: Material, texts: Iterator[str], length: int) -> Sequences:
    """Return sequences, each with what the tokenizer puts before a text, until there is enough."""
    front = leading_specials(material.model.tokenizer)
    wanted, ids, found = material.settings.text_tokens, list[int](), Sequences()
    step = length - len(front)
    for text in texts:
        ids += encode_plain(material.model.tokenizer, text)[0]
        while len(ids) >= step and wanted > 0:
            found.append((*front, *ids[:step]))
            ids = ids[step:]
            wanted -= length
        if wanted <= 0:
            break
    if ids and wanted > 0:
        found.append((*front, *ids))
    return [sequence for sequence in found if len(sequence) >= _SHORTEST]


def _samples(material: Material, length: int) -> Sequences:
    """Return the run's prompts, each in turn and as often as needed, continued to one length."""
    length = min(length, material.settings.sample_length)
    prompts = [item.sequence[: item.length][:length] for item in material.passes]
    longest = max(len(row) for row in prompts)
    if longest == length:
        return [row for row in prompts if len(row) >= _SHORTEST]
    found = Sequences()
    while sum(len(row) for row in found) < material.settings.sample_tokens:
        first = len(found)
        rows = [prompts[(first + row) % len(prompts)] for row in range(_ROWS)]
        drawn = material.model.generate(
            TokenBatch.from_ids([list(row) for row in rows]),
            max_new_tokens=length - longest,
            temperature=1.0,
            seed=first,
            eos=False,
        )
        found += [(*row, *ids) for row, ids in zip(rows, drawn.ids, strict=True)]
    return found


def _unwritable(material: Material) -> str:
    """Say why the built-in text cannot be written by this tokenizer, "" where it can."""
    tokenizer, text = material.model.tokenizer, _builtin()
    try:
        ids, _ = encode_plain(tokenizer, text)
    except PromptError as error:
        return f"the built-in text was not read ({error})"
    known = [token for token in ids if token != tokenizer.unk_token_id]
    written = "".join(str(tokenizer.decode(known)).split())
    covered = len(written) / len("".join(text.split()))
    if covered >= _COVERED and len(known) >= _COVERED * len(ids):
        return ""
    return f"this tokenizer can write {covered:.0%} of the built-in text"


def _unreadable(material: Material, sequences: Sequences) -> str:
    """Say that the model does not read a text, "" where it does."""
    bits = _bits(material, sequences)
    if bits <= _most_bits(material):
        return ""
    return (
        f"the model spends {bits:.1f} bits on a token of the built-in text, a uniform guess "
        f"{math.log2(material.model.d_vocab):.1f}"
    )


def _most_bits(material: Material) -> float:
    return _READABLE * math.log2(material.model.d_vocab)


def _bits(material: Material, sequences: Sequence[Sequence[int]]) -> float:
    """Return the model's own cross-entropy on the first sequence, bits per token."""
    if not sequences:
        return math.inf
    ids = torch.tensor([list(sequences[0])])
    found = material.model.run(ids, logits="all", products=material.config.run_products).logits
    assert found is not None
    log_p = found[0, :-1].double().log_softmax(-1).cpu()
    return float(-log_p.gather(-1, ids[0, 1:, None]).mean()) / math.log(2.0)


def _builtin() -> str:
    here = resources.files("layerscope.experiments.layers.diagnostics")
    return (here / "held_out.txt").read_text(encoding="utf-8")
