"""A self-contained HTML page from plain parts: figures, tables, heat maps, lines, bars.

Nothing is loaded from outside the file, and everything that a model or a prompt says is escaped.
Each experiment has a module here that turns its outcome into sections of such a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerscope.errors import OutputError
from layerscope.files import write_text
from layerscope.reports import drawing
from layerscope.reports.text import json_block, number

Number = float | int | None
WIDE, NARROW = 760.0, 380.0  # pixels of a drawing, alone and among others


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text."""

    paragraphs: Sequence[str]
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Figures:
    """Headline figures: (label, value, note) each; the note may be empty."""

    items: Sequence[tuple[str, Any, str]]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Reasons:
    """Ranked reasons for caution: mappings with severity, message and action."""

    items: Sequence[Mapping[str, Any]]
    kind: ClassVar[str] = "reasons"


@dataclass(frozen=True)
class Greyed:
    """A table cell whose value may not be read like the others: drawn grey, with the reason."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a column's head; numbers are aligned and shortened.

    `folded` shows only the caption until it is opened, for long lists.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    folded: bool = False
    kind: ClassVar[str] = "table"

    def numeric(self, column: int) -> bool:
        """Return True when a column holds numbers only."""
        values = [_plain(row[column]) for row in self.rows if _plain(row[column]) is not None]
        return bool(values) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column; None is drawn as absent.

    Args:
        values: one list per row, the first row drawn at the top.
        rows: their labels. columns: labels of the columns.
        unit: of the values. diverging: colour by sign around zero.
        hover: extra text of each cell, shaped like `values`.
    """

    values: Sequence[Sequence[Number]]
    rows: Sequence[str]
    columns: Sequence[str]
    caption: str
    unit: str = ""
    diverging: bool = False
    hover: Sequence[Sequence[str]] | None = None
    row_title: str = ""
    column_title: str = ""
    kind: ClassVar[str] = "drawing"

    def draw(self, width: float = WIDE) -> Markup:
        """Return the drawing, at most so many pixels wide."""
        return drawing.heat_map(self, width)


@dataclass(frozen=True)
class Lines:
    """Series of (x, y) points joined by lines; a null y breaks the line.

    Args:
        bands: per series (x, low, high), drawn as a shade.
        log_y: a logarithmic y axis.
        points: draw dots and no lines (a scatter).
    """

    series: Mapping[str, Sequence[tuple[float, Number]]]
    x: str
    y: str
    caption: str
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=lambda: {})
    log_y: bool = False
    points: bool = False
    kind: ClassVar[str] = "drawing"

    def draw(self, width: float = WIDE) -> Markup:
        """Return the drawing, at most so many pixels wide."""
        return drawing.lines(self, width)


@dataclass(frozen=True)
class Bars:
    """One horizontal bar per label; errors are (low, high) ends of an interval, or None."""

    labels: Sequence[str]
    values: Sequence[Number]
    caption: str
    unit: str = ""
    errors: Sequence[tuple[float, float] | None] | None = None
    kind: ClassVar[str] = "drawing"

    def draw(self, width: float = WIDE) -> Markup:
        """Return the drawing, at most so many pixels wide."""
        return drawing.bars(self, width)


@dataclass(frozen=True)
class Multiples:
    """Small drawings side by side."""

    items: Sequence[HeatMap | Lines | Bars]
    kind: ClassVar[str] = "multiples"


@dataclass(frozen=True)
class Widget:
    """A part that draws itself in the browser: its data, its script, its style.

    `script` is code of ours that reads ``JSON.parse(document.getElementById(id).textContent)``;
    `html` is trusted markup of ours, and `data` is escaped as JSON.
    """

    id: str
    data: Any
    script: str
    html: str = ""
    style: str = ""
    kind: ClassVar[str] = "widget"

    @property
    def block(self) -> Markup:
        """Return the data as the content of a JSON script element."""
        return Markup(json_block(self.data))


Part = Text | Figures | Reasons | Table | HeatMap | Lines | Bars | Multiples | Widget


@dataclass(frozen=True)
class Section:
    """A heading, a sentence of what is to be seen, and parts."""

    title: str
    parts: Sequence[Part]
    lead: str = ""


def render_page(
    *,
    title: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any] | None = None,
    kicker: str = "",
    verdict: str = "",
) -> str:
    """Return the page as text; raises OutputError without sections."""
    if not sections:
        raise OutputError("there is nothing to report: pass at least one section")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            kicker=kicker,
            verdict=verdict,
            sections=sections,
            provenance=_pretty(provenance),
            style=Markup(_asset("page.css")),
            script=Markup(_asset("page.js")),
            narrow=NARROW,
        )
    )


def write_page(
    path: Path,
    *,
    title: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any] | None = None,
    kicker: str = "",
    verdict: str = "",
) -> Path:
    """Write a page to `path`, whole or not at all, and return the path."""
    page = render_page(
        title=title, sections=sections, provenance=provenance, kicker=kicker, verdict=verdict
    )
    write_text(path, page)
    return path


def _pretty(provenance: Mapping[str, Any] | None) -> str:
    import json

    return json.dumps(provenance, indent=2, ensure_ascii=False, default=str) if provenance else ""


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Greyed) else value


def _sort_key(value: Any) -> str:
    """Return what the browser sorts by: the number itself where there is one."""
    value = _plain(value)
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, int | float) else str(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("layerscope.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["sort_key"] = _sort_key
    return environment


@cache
def _asset(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
