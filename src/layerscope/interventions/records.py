"""Data files of many shapes: what a JSON, YAML or CSV file holds, as plain values."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import yaml

from layerscope.errors import PromptError

SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv")


def read_records(path: str | Path) -> Any:
    """Return the content of a data file: a list of mappings for tables, else what is written.

    Raises:
        PromptError: the file is missing, of another kind, or damaged.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PromptError(f"{path}: data must be a {', '.join(SUFFIXES)} file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist; give a data file") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _parse(text, suffix)
    except (ValueError, yaml.YAMLError, csv.Error) as error:
        line = " ".join(str(error).split())
        raise PromptError(f"{path} is not valid {suffix[1:].upper()}: {line}") from None


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if suffix in (".yaml", ".yml"):
        return yaml.safe_load(text)
    delimiter = "\t" if suffix == ".tsv" else ","
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
