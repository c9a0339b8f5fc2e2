"""From a stream of text to packed token sequences: fitted on, validated on, and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.lenses.fitting.text import TextSource
from layerscope.models.language_model import LanguageModel
from layerscope.models.prompts import encode_plain, leading_specials

SPLITS = ("train", "validation", "held_out")
DEFAULT_CONTEXT = 256


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How much text a fit reads, and how it is cut and sampled.

    Attributes:
        tokens: tokens to fit on.
        evaluation_tokens: tokens to validate on, and as many held out for the reported figures.
        context: tokens of a packed sequence; None for 256 or the model's context if that is less.
        positions: positions sampled of every sequence to fit on.
        skip: first positions of a sequence that are never sampled: their residuals are not typical
            (attention sinks).
        evaluation_positions: positions sampled of every sequence to validate and to report on, at
            most as many as to fit on; all their states are held at once.
        batch: sequences that run at once.
        seed: of the order of sequences and the sampling of positions.
    """

    tokens: int = 262_144
    evaluation_tokens: int = 32_768
    context: int | None = None
    positions: int = 128
    evaluation_positions: int = 32
    skip: int = 4
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "evaluation_tokens", "positions", "evaluation_positions", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.skip < 0:
            raise ConfigError(f"skip is {self.skip}; give 0 or more")

    def length(self, model: LanguageModel) -> int:
        """Return the tokens of a sequence for this model; raises ConfigError if too many or few."""
        limit = model.n_ctx
        length = self.context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
        if limit is not None and length > limit:
            raise ConfigError(
                f"context {length} is beyond the model's, {limit} tokens; give at most {limit}"
            )
        if length <= self.skip:
            raise ConfigError(f"context {length} leaves nothing after skip {self.skip}")
        return length


@dataclass(frozen=True, eq=False)
class Corpus:
    """Packed sequences of token ids, all of one length, by split.

    Documents are told apart by the hash of their text, so that no document, nor a copy of it,
    is in two splits.

    Attributes:
        train, validation, held_out: [sequence, pos] int32 ids.
        sha256: of all ids and their shapes.
        description: where the text came from, ready for JSON.
    """

    train: Int[Tensor, "sequence pos"]
    validation: Int[Tensor, "sequence pos"]
    held_out: Int[Tensor, "sequence pos"]
    sha256: str
    description: dict[str, Any] = field(default_factory=dict[str, Any])


def read_corpus(source: TextSource, model: LanguageModel, config: DataConfig) -> Corpus:
    """Read as much text as the configuration asks for, and pack it.

    A sequence is whatever the tokenizer puts before a text (a BOS, or nothing) and a stretch of
    running text; documents are joined as the tokenizer would begin the next one (its BOS, else
    its EOS), pieces of one plain file by nothing. Ids are kept, 4 bytes a token; text is not.

    Raises:
        ConfigError: the text is too short, or cannot be read; says how many tokens there are.
    """
    length = config.length(model)
    front = leading_specials(model.tokenizer)
    eos = model.tokenizer.eos_token_id
    between = front or ((eos,) if isinstance(eos, int) else ())
    needed = _sequences_needed(config, length)
    packers = {name: _Packer(length, front, needed[name]) for name in SPLITS}
    digest = hashlib.sha256()
    n_documents = 0
    for text in source.documents():
        content = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
        packer = packers[_split_of(content, needed)]
        if not packer.full:
            digest.update(content)
            n_documents += 1
            ids, _ = encode_plain(model.tokenizer, text)
            packer.add(ids, () if source.continuous else between)
        if all(other.full for other in packers.values()):
            break
    _check_enough(packers, needed, source, config, length)
    order = torch.randperm(needed["train"], generator=torch.Generator().manual_seed(config.seed))
    found = {name: packers[name].packed() for name in SPLITS}
    found["train"] = found["train"][order]
    ids_digest = hashlib.sha256()
    for name in SPLITS:
        ids_digest.update(f"{name} {list(found[name].shape)}\n".encode())
        ids_digest.update(found[name].contiguous().numpy().tobytes())
    description = {
        "location": source.location,
        "kind": source.kind,
        "field": source.field,
        "documents": n_documents,
        "text_sha256": digest.hexdigest(),
        "ids_sha256": ids_digest.hexdigest(),
        "context": length,
        "tokens": {name: found[name].numel() for name in SPLITS},
    }
    return Corpus(
        found["train"],
        found["validation"],
        found["held_out"],
        ids_digest.hexdigest(),
        description,
    )


def batches(
    ids: Int[Tensor, "sequence pos"], config: DataConfig
) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Yield batches of int64 ids with the sampled positions of each of their sequences."""
    for first in range(0, len(ids), config.batch):
        yield batch_at(ids, config, first // config.batch)


def n_batches(ids: Int[Tensor, "sequence pos"], config: DataConfig) -> int:
    """Return how many batches `batches` yields."""
    return -(-len(ids) // config.batch)


def batch_at(
    ids: Int[Tensor, "sequence pos"], config: DataConfig, index: int, *, epoch: int = 0
) -> tuple[Tensor, list[list[int]]]:
    """Return one batch of ids and its sampled positions, the same whenever it is asked for.

    Positions of a sequence are drawn without replacement, anew in every epoch.
    """
    part = ids[index * config.batch : (index + 1) * config.batch].long()
    candidates = part.shape[1] - config.skip
    generator = torch.Generator()
    chosen: list[list[int]] = []
    for row in range(len(part)):
        # Hashed, because the generator takes no more than the lowest 32 bits of a seed.
        words = f"{config.seed} {epoch} {index * config.batch + row}".encode()
        digest = hashlib.blake2b(words, digest_size=4).digest()
        generator.manual_seed(int.from_bytes(digest, "big"))
        drawn = torch.randperm(candidates, generator=generator)[: config.positions]
        chosen.append((drawn.sort().values + config.skip).tolist())
    return part, chosen


class _Packer:
    """Fills sequences of one length from running text."""

    def __init__(self, length: int, front: tuple[int, ...], needed: int) -> None:
        self._length, self._front, self._needed = length, front, needed
        self._rows: list[Tensor] = []
        self._open = list(front)

    @property
    def full(self) -> bool:
        return len(self._rows) >= self._needed

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, ids: tuple[int, ...], between: tuple[int, ...]) -> None:
        started = len(self._open) > len(self._front)
        self._open.extend((*between, *ids) if started else ids)
        while len(self._open) >= self._length and not self.full:
            self._rows.append(torch.tensor(self._open[: self._length], dtype=torch.int32))
            self._open = [*self._front, *self._open[self._length :]]

    def packed(self) -> Int[Tensor, "sequence pos"]:
        return torch.stack(self._rows)


def _sequences_needed(config: DataConfig, length: int) -> dict[str, int]:
    evaluation = -(-config.evaluation_tokens // length)
    return {
        "train": -(-config.tokens // length),
        "validation": evaluation,
        "held_out": evaluation,
    }


def _split_of(content: bytes, needed: dict[str, int]) -> str:
    """Deal a document to a split by its hash, in proportion to what the splits need."""
    # A little more for the small splits, so that chance does not leave them short at the end.
    shares = {name: n + (n // 4 + 2 if name != "train" else 0) for name, n in needed.items()}
    point = int.from_bytes(content[:8], "big") / 2**64 * sum(shares.values())
    for name in ("held_out", "validation"):
        if point < shares[name]:
            return name
        point -= shares[name]
    return "train"


def _check_enough(
    packers: dict[str, _Packer],
    needed: dict[str, int],
    source: TextSource,
    config: DataConfig,
    length: int,
) -> None:
    if all(packer.full for packer in packers.values()):
        return
    least = min(len(packers[name]) / needed[name] for name in SPLITS)
    advice = "give more text"
    if least * config.tokens * 0.9 >= length:
        tokens, evaluation = (
            int(least * 0.9 * n) // length * length
            for n in (config.tokens, config.evaluation_tokens)
        )
        if tokens and evaluation:
            advice += f", or ask for less (tokens={tokens}, evaluation_tokens={evaluation})"
    fit_on, validate, held_out = (
        f"{len(packers[name]) * length:,} of {needed[name] * length:,} tokens" for name in SPLITS
    )
    raise ConfigError(
        f"{source.location} is too short for the fit: it gives {fit_on} to fit on, {validate} to "
        f"validate, {held_out} held out; {advice}"
    )
