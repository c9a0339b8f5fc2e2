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
DATA_BUDGET_BYTES = 1_500_000  # of the data blocks of a page together; the page promises 2 MB
_STYLES = ("layers.css",)
_SCRIPTS = ("layers.text.js", "layers.grid.js", "layers.curves.js", "layers.main.js")


def layers_page(reports: Report | Sequence[Report]) -> str:
    """Return the page of one report, or of several, each a (table, summary, provenance) triple.

    Everything but plotly.js stays under 2 MB; nothing is loaded from outside the file.
    """
    entries = _as_list(reports)
    if not entries:
        raise OutputError("there is nothing to report: pass at least one table with its summary")
    sections: list[ModelSections] = []
    payloads: list[dict[str, Any]] = []
    for table, summary, provenance in entries:
        data = model_data(table, summary, budget_bytes=DATA_BUDGET_BYTES // len(entries))
        payloads.append(data.payload)
        sections.append(model_sections(table, summary, provenance, omitted=data.omitted))
    labels = {entry.name: [entry.label, entry.meaning] for entry in MILESTONES}
    return (
        _environment()
        .get_template("layers.html.j2")
        .render(
            models=sections,
            data=Markup(json_block({"models": payloads, "milestones": labels})),
            plotly=Markup(_plotly()),
            styles=Markup("\n".join(_asset(name) for name in _STYLES)),
            scripts=Markup("\n".join(_asset(name) for name in _SCRIPTS)),
            terms=TERMS,
            milestones=MILESTONES,
            markers=MARKER_LEGEND,
        )
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
