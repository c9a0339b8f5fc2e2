"""One published model: its tables through our measures, and its published summary."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from layerscope.measures.compat import published_document
from layerscope.measures.config import MeasureConfig
from layerscope.measures.published import read_published
from layerscope.measures.published_audit import (
    companions,
    published_sections,
    read_positions,
    read_variants,
)
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from support.shared import shared_path

MODELS = ("Meta-Llama-3-8B", "gemma-2-9b")

# The earlier system never widened its window (it looked before the risk was known).
CONFIG = MeasureConfig(window_radius_high=MeasureConfig().window_radius)


@dataclass(frozen=True)
class Case:
    """A published model as both sides of a comparison."""

    name: str
    table: LayersTable
    ours: dict[str, Any]
    published: dict[str, Any]

    def file(self, suffix: str) -> Path:
        return shared_path("published", f"output-{self.name}{suffix}")

    def rows(self, suffix: str) -> list[dict[str, str | None]]:
        """Return the cells of one of the published CSV files; "" is None."""
        with self.file(suffix).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, escapechar="\\")
            return [{key: cell or None for key, cell in row.items()} for row in reader]


@cache
def case(name: str) -> Case:
    pure = shared_path("published", f"output-{name}-pure-next-token.csv")
    files = companions(pure)
    assert sorted(files) == ["positions", "prism", "rawlens", "tuned", "variants"]
    table = read_published(
        pure,
        rawlens=files["rawlens"],
        others={lens: files[lens] for lens in ("tuned", "prism")},
    )
    sections = published_sections(
        table,
        variants=read_variants(files["variants"]),
        positions=read_positions(files["positions"]),
        config=CONFIG,
    )
    document = json.loads(shared_path("published", f"output-{name}.json").read_text("utf-8"))
    return Case(
        name=name,
        table=table,
        ours=published_document(summarise(table, CONFIG, diagnostics=sections).to_dict()),
        published=document | document["diagnostics"] | {"tuned_lens": document["tuned_lens"]},
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every scalar of a JSON document with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def at(document: Any, path: str) -> Any:
    """Return what stands at a path; a part may contain dots, so parts are separated by slashes."""
    for part in path.split("/"):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def same(ours: Any, theirs: Any) -> bool:
    """Compare two values: floats to 1e-9 relative, all else exactly, bool never as a number."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    plain = int | float
    if isinstance(ours, bool) or isinstance(theirs, bool) or not isinstance(ours, plain):
        return ours is theirs or ours == theirs
    return isinstance(theirs, plain) and math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=0.0)
