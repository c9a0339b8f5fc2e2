"""The tokenizer: byte-level BPE learned from the training text, and its Hugging Face files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from layerscope.demo import corpus, facts, tasks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL = (BOS, EOS, PAD)
VOCABULARY_SIZE = 3072
CONTEXT = 256
_SAMPLE_DOCUMENTS = 30_000
_WORD_COPIES = 40


def _texts(seed: int) -> Iterator[str]:
    """Yield the text to learn merges from.

    Sequences for copying are left out: their random names would fill the vocabulary. Words that
    are to be one token (each with and without a space before it) are repeated often enough.
    """
    for document in islice(corpus.documents(seed), _SAMPLE_DOCUMENTS):
        if document.kind != "copying":
            yield document.text
    for row in tasks.word_table():
        for column in ("word", "antonym", "plural", "past", "spanish"):
            yield from (f" {row[column]}" for _ in range(_WORD_COPIES))
        yield from (row["word"] for _ in range(_WORD_COPIES))
    for row in facts.facts_table():
        for cell in row.values():
            yield from (f" {cell}" for _ in range(_WORD_COPIES))
            yield from (cell for _ in range(_WORD_COPIES))


def build_tokenizer(seed: int = corpus.SEED) -> Tokenizer:
    """Learn the tokenizer; it puts one BOS before a text, and no EOS after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, special_id(tokenizer, BOS))],
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the number of a special token, which the tokenizer is sure to have."""
    number = tokenizer.token_to_id(token)
    if number is None:
        message = f"the tokenizer lacks {token}"
        raise ValueError(message)
    return number


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files from which `AutoTokenizer.from_pretrained` loads the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    text = json.dumps(settings, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
