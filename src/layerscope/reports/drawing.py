"""Heat maps, lines and bars as SVG that needs no script, follows the theme, and prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from markupsafe import Markup, escape

from layerscope.reports.text import number

if TYPE_CHECKING:
    from layerscope.reports.page import Bars, HeatMap, Lines

_CELL = (14.0, 34.0)  # narrowest and widest column of a heat map
_ROW = 20.0
_CHAR = 6.6  # width of a character of the labels
_LABELS = 60  # longest label that is written out
_BAR_LIMIT = 60


def heat_map(part: HeatMap, widest: float) -> Markup:
    """Return a heat map; colours are scaled to the largest size among its finite values."""
    finite = [v for row in part.values for v in row if v is not None and math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    low = min(low, 0.0) if part.diverging else low
    top = max(abs(low), abs(high)) if part.diverging else high - low
    rows = [_short(label) for label in part.rows]
    left = (
        12.0 + _CHAR * max((len(label) for label in rows), default=0) + 16.0 * bool(part.row_title)
    )
    cell = min(max((widest - left) / max(len(part.columns), 1), _CELL[0]), _CELL[1])
    columns = [_short(label) for label in part.columns]
    bottom = _CHAR * max((len(label) for label in columns), default=0) + 14.0
    width = left + cell * len(columns) + 10.0
    height = _ROW * len(rows) + bottom + 18.0 * bool(part.column_title)
    body: list[Markup] = []
    for i, row in enumerate(part.values):
        y = i * _ROW
        body.append(_text(left - 6, y + 14, rows[i], "end"))
        for j, value in enumerate(row):
            body.append(_cell(part, i, j, value, left + j * cell, y, cell, low, top))
    for j, label in enumerate(columns):
        x, y = left + (j + 0.5) * cell + 4, len(rows) * _ROW + 8
        body.append(_turned(x, y, label))
    if part.row_title:
        body.append(_turned(12, len(rows) * _ROW / 2, part.row_title, anchor="middle", up=True))
    if part.column_title:
        body.append(_text(left + cell * len(columns) / 2, height - 6, part.column_title, "middle"))
    drawn = _svg(width, height, body, part.caption)
    return drawn + _ramp(part, low, high)


def _cell(
    part: HeatMap,
    i: int,
    j: int,
    value: float | int | None,
    x: float,
    y: float,
    cell: float,
    low: float,
    top: float,
) -> Markup:
    where = f"{part.rows[i]}, {part.columns[j]}"
    if value is None or not math.isfinite(value):
        tip, style = f"{where}: no value", Markup('class="absent"')
    else:
        share = 0.0 if top == 0 else (abs(value) if part.diverging else value - low) / top
        kind = "neg" if part.diverging and value < 0 else "pos"
        tip = f"{where}: {number(float(value), 4)} {part.unit}".rstrip()
        style = Markup(f'class="{kind}" fill-opacity="{max(share, 0.0):.3f}"')
    if part.hover is not None:
        tip += f" · {part.hover[i][j]}"
    return Markup(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{_ROW - 1:.1f}" {style} '
        'data-tip="{tip}"/>'
    ).format(tip=tip)


def _ramp(part: HeatMap, low: float, high: float) -> Markup:
    left = -max(abs(low), abs(high)) if part.diverging else low
    right = max(abs(low), abs(high)) if part.diverging else high
    return Markup(
        '<p class="ramp"><span>{left}</span><i class="{kind}"></i><span>{right} {unit}</span></p>'
    ).format(
        left=number(float(left)),
        right=number(float(right)),
        unit=part.unit,
        kind="both" if part.diverging else "one",
    )


def lines(part: Lines, width: float) -> Markup:
    """Return lines (or dots) over one pair of axes, with a legend."""
    xs = [float(x) for points in part.series.values() for x, _ in points]
    ys = [float(y) for points in part.series.values() for _, y in points if _finite(y)]
    ys += [end for band in part.bands.values() for _, *ends in band for end in ends]
    if part.log_y:
        ys = [y for y in ys if y > 0]
    if not xs or not ys:
        return Markup('<p class="note">No finite values to draw.</p>')
    frame = _Frame(min(xs), max(xs), min(ys), max(ys), width=width, log=part.log_y)
    body = frame.axes(part.x, part.y)
    for index, (name, points) in enumerate(part.series.items()):
        colour = f"s{index % 8}"
        band = part.bands.get(name, ())
        if band:
            outline = [(x, high) for x, _, high in band] + [
                (x, low) for x, low, _ in reversed(band)
            ]
            body.append(Markup(f'<path class="band {colour}" d="{frame.path(outline)}Z"/>'))
        if not part.points:
            for run in _runs(points, positive=part.log_y):
                body.append(Markup(f'<path class="line {colour}" d="{frame.path(run)}"/>'))
        body += [_dot(frame, name, x, y, colour) for x, y in _drawable(points, part.log_y)]
    legend = Markup("").join(
        Markup('<span><i class="s{index}"></i>{name}</span>').format(index=index % 8, name=name)
        for index, name in enumerate(part.series)
    )
    drawn = _svg(frame.width, frame.height, body, part.caption)
    return drawn + Markup('<p class="key">{legend}</p>').format(legend=legend)


def _dot(frame: _Frame, name: str, x: float, y: float, colour: str) -> Markup:
    return Markup(
        f'<circle class="{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" '
        'data-tip="{name}: {at}, {value}"/>'
    ).format(name=name, at=number(float(x), 4), value=number(float(y), 4))


class _Frame:
    """A pair of axes and where a value lies in them."""

    left, right, top, bottom = 62.0, 12.0, 10.0, 44.0

    def __init__(
        self, x0: float, x1: float, y0: float, y1: float, *, width: float, log: bool
    ) -> None:
        self.log, self.width = log, width
        self.height = 300.0 if width > 500 else 230.0
        if log:
            y0, y1 = math.log10(y0), math.log10(y1)
        pad = (y1 - y0) * 0.05 or abs(y1) * 0.1 or 1.0
        self.x0, self.x1 = x0, x1 if x1 > x0 else x0 + 1.0
        self.y0, self.y1 = y0 - pad, y1 + pad

    def x(self, value: float) -> float:
        span = self.width - self.left - self.right
        return self.left + (value - self.x0) / (self.x1 - self.x0) * span

    def y(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - (at - self.y0) / (self.y1 - self.y0) * span

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, x_title: str, y_title: str) -> list[Markup]:
        """Return grid lines, tick labels and titles."""
        body: list[Markup] = []
        for tick in _ticks(self.x0, self.x1):
            x = self.x(tick)
            body.append(_line(x, self.top, x, self.height - self.bottom))
            body.append(_text(x, self.height - self.bottom + 15, number(tick), "middle"))
        for tick in _ticks(self.y0, self.y1):
            value = 10**tick if self.log else tick
            y = self.y(value)
            body.append(_line(self.left, y, self.width - self.right, y))
            body.append(_text(self.left - 6, y + 4, number(value), "end"))
        middle = (self.left + self.width - self.right) / 2
        body.append(_text(middle, self.height - 8, x_title, "middle"))
        up = (self.top + self.height - self.bottom) / 2
        body.append(_turned(13, up, y_title, anchor="middle", up=True))
        return body


def bars(part: Bars, width: float) -> Markup:
    """Return horizontal bars around a common zero, with intervals where given."""
    shown = list(zip(part.labels, part.values, strict=True))[:_BAR_LIMIT]
    errors = part.errors or [None] * len(shown)
    finite = [float(v) for _, v in shown if _finite(v)]
    finite += [end for pair in errors[: len(shown)] if pair is not None for end in pair]
    if not finite:
        return Markup('<p class="note">No finite values to draw.</p>')
    low, high = min(0.0, *finite), max(0.0, *finite)
    scale = (high - low) or 1.0
    left = 14.0 + _CHAR * max(len(_short(label)) for label, _ in shown)
    span = width - left - 90.0
    zero = left - low / scale * span
    body: list[Markup] = []
    for index, (label, value) in enumerate(shown):
        y = index * _ROW
        body.append(_text(left - 6, y + 14, _short(label), "end"))
        if not _finite(value):
            body.append(_text(zero + 4, y + 14, "no value"))
            continue
        end = left + (value - low) / scale * span
        body.append(_bar(label, float(value), min(zero, end), abs(end - zero), y, part.unit))
        pair = errors[index]
        right = end
        if pair is not None:
            a, b = (left + (limit - low) / scale * span for limit in pair)
            body.append(Markup(f'<path class="error" d="M{a:.1f},{y + 9.5:.1f}H{b:.1f}"/>'))
            right = max(right, b)
        body.append(_text(max(right, zero) + 5, y + 14, number(float(value))))
    rest = len(part.labels) - len(shown)
    drawn = _svg(width, _ROW * len(shown) + 4, body, part.caption)
    return drawn + (
        Markup('<p class="note">{rest} more are not drawn.</p>').format(rest=rest)
        if rest
        else Markup("")
    )


def _bar(label: str, value: float, x: float, width: float, y: float, unit: str) -> Markup:
    kind = "neg" if value < 0 else "pos"
    return Markup(
        f'<rect class="{kind}" x="{x:.1f}" y="{y + 3:.1f}" width="{max(width, 1):.1f}" '
        f'height="{_ROW - 7:.1f}" '
        'data-tip="{label}: {value} {unit}"/>'
    ).format(label=label, value=number(value, 4), unit=unit)


def _svg(width: float, height: float, body: Sequence[Markup], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        'aria-label="{label}">{body}</svg>'
    ).format(label=label, body=Markup("").join(body))


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')


def _turned(x: float, y: float, text: str, *, anchor: str = "end", up: bool = False) -> Markup:
    angle = -90 if up or anchor == "end" else 90
    return Markup(
        f'<text transform="translate({x:.1f},{y:.1f}) rotate({angle})" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float) -> Markup:
    return Markup(f'<path class="tick" d="M{x0:.1f},{y0:.1f}L{x1:.1f},{y1:.1f}"/>')


def _short(label: str) -> str:
    return label if len(label) <= _LABELS else label[: _LABELS - 1] + "…"


def _finite(value: float | int | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _drawable(
    points: Iterable[tuple[float, float | int | None]], positive: bool
) -> list[tuple[float, float]]:
    return [
        (x, float(y))
        for x, y in points
        if y is not None and math.isfinite(y) and (y > 0 or not positive)
    ]


def _runs(
    points: Sequence[tuple[float, float | int | None]], *, positive: bool
) -> list[list[tuple[float, float]]]:
    """Cut a series where a value is missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        found = _drawable([point], positive)
        if found:
            runs[-1] += found
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers between two."""
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]
