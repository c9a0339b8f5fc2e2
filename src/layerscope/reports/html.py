"""The self-contained HTML page of a layers run: one file, no requests, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerscope.errors import OutputError
from layerscope.files import write_text
from layerscope.measures.table import LayersTable
from layerscope.reports.data import model_data
from layerscope.reports.glossary import MILESTONES, TERMS
from layerscope.reports.sections import ModelSections, model_sections
from layerscope.reports.text import MARKER_LEGEND, json_block, number

Report = tuple[LayersTable, Mapping[str, Any], Mapping[str, Any]]
PAGE_BYTES = 1_900_000  # of everything but plotly.js; the page promises to stay under 2 MB
MIN_DATA_BYTES = 200_000  # even when provenance and facts fill the page
SHOWN_REASONS = 3  # more than these are folded, so that the figures stay in reach
_STYLES = ("layers.css",)
_SCRIPTS = (
    "layers.text.js",
    "layers.grid.js",
    "layers.curves.js",
    "layers.multiples.js",
    "layers.main.js",
)


def layers_page(reports: Report | Sequence[Report]) -> str:
    """Return the page of one report, or of several, each a (table, summary, provenance) triple.

    Everything but plotly.js stays under 2 MB; nothing is loaded from outside the file.
    """
    entries = _as_list(reports)
    if not entries:
        raise OutputError("there is nothing to report: pass at least one table with its summary")
    # What is written once is measured first; the data gets what remains of the promised size.
    fixed = len(_render([model_sections(*entry) for entry in entries], [], plotly="").encode())
    budget = max(MIN_DATA_BYTES, PAGE_BYTES - fixed) // len(entries)
    sections: list[ModelSections] = []
    payloads: list[dict[str, Any]] = []
    for table, summary, provenance in entries:
        data = model_data(table, summary, budget_bytes=budget)
        payloads.append(data.payload)
        sections.append(model_sections(table, summary, provenance, omitted=data.omitted))
    return _render(sections, payloads, plotly=_plotly())


def _render(
    sections: Sequence[ModelSections], payloads: Sequence[dict[str, Any]], *, plotly: str
) -> str:
    labels = {entry.name: [entry.label, entry.meaning] for entry in MILESTONES}
    template = _environment().get_template("layers.html.j2")
    return template.render(
        models=sections,
        data=Markup(json_block({"models": payloads, "milestones": labels})),
        plotly=Markup(plotly),
        styles=Markup("\n".join(_asset(name) for name in _STYLES)),
        scripts=Markup("\n".join(_asset(name) for name in _SCRIPTS)),
        shown_reasons=SHOWN_REASONS,
        terms=TERMS,
        milestones=MILESTONES,
        markers=MARKER_LEGEND,
    )


def write_html(path: Path, reports: Report | Sequence[Report]) -> Path:
    """Write the page to ``path`` (whole or not at all) and return the path."""
    write_text(path, layers_page(reports))
    return path


def _as_list(reports: Report | Sequence[Report]) -> list[Report]:
    if reports and isinstance(reports[0], LayersTable):
        return [cast("Report", reports)]
    return list(cast("Sequence[Report]", reports))


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
    return environment


@cache
def _asset(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
