"""Draw box plots as SVG text, one row per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 1000, 190, 30, 34, 10
_COLOUR = "#4363d8"


def draw_box_plots(values: Mapping[str, Sequence[tuple[float, str]]], upper: float | None) -> str:
    """Return an SVG element.

    Each row shows all cases as dots, a box from the first to the third quartile, its median, and whiskers to the last
    case within one and a half times the box.

    Args:
        values: Name of the row -> (value, name of the case); NaN is left out.
        upper: Right end of the scale; None: the largest value.
    """
    known = {name: [pair for pair in pairs if math.isfinite(pair[0])] for name, pairs in values.items()}
    if upper is None:
        upper = max((value for pairs in known.values() for value, _ in pairs), default=1.0) or 1.0
    height = _TOP + _ROW * len(known) + 24
    parts = [_axis(upper, height)]
    for number, (name, pairs) in enumerate(known.items()):
        parts.append(_row(name, pairs, upper, _TOP + _ROW * number + _ROW / 2))
    return f"<svg viewBox='0 0 {_WIDTH} {height}' role='img'>{''.join(parts)}</svg>"


def _axis(upper: float, height: int) -> str:
    parts = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        x = _x(fraction * upper, upper)
        parts.append(
            f"<line x1='{x}' x2='{x}' y1='{_TOP}' y2='{height - 22}' stroke='#8886'/>"
            f"<text x='{x}' y='{height - 6}' text-anchor='middle'>{fraction * upper:.3g}</text>"
        )
    return "".join(parts)


def _row(name: str, pairs: Sequence[tuple[float, str]], upper: float, y: float) -> str:
    label = name if len(name) <= 26 else name[:25] + "…"
    parts = [
        f"<text x='{_LEFT - 10}' y='{y + 4}' text-anchor='end'>{escape(label)}<title>{escape(name)}</title></text>"
    ]
    if not pairs:
        parts.append(f"<text x='{_LEFT + 4}' y='{y + 4}' opacity='.6'>in no case</text>")
        return "".join(parts)
    numbers = np.array([value for value, _ in pairs])
    low, middle, high = np.percentile(numbers, (25, 50, 75))
    reach = 1.5 * (high - low)
    start, end = numbers[numbers >= low - reach].min(), numbers[numbers <= high + reach].max()
    line = f"stroke='{_COLOUR}' stroke-width='1.5'"
    parts.append(f"<line x1='{_x(start, upper)}' x2='{_x(end, upper)}' y1='{y}' y2='{y}' {line}/>")
    parts.append(
        f"<rect x='{_x(low, upper)}' y='{y - 9}' width='{max(1.0, _x(high, upper) - _x(low, upper)):.1f}' "
        f"height='18' fill='{_COLOUR}' fill-opacity='.25' {line}/>"
    )
    parts.append(
        f"<line x1='{_x(middle, upper)}' x2='{_x(middle, upper)}' y1='{y - 9}' y2='{y + 9}' "
        f"stroke='{_COLOUR}' stroke-width='3'/>"
    )
    for place, (value, case) in enumerate(pairs):
        # spread over the row, so that equal cases do not hide each other
        parts.append(
            f"<circle cx='{_x(value, upper)}' cy='{y + (place % 5 - 2) * 3}' r='2.6' fill='#e6194B' "
            f"fill-opacity='.65'><title>{escape(case)}: {value:.4g}</title></circle>"
        )
    return "".join(parts)


def _x(value: float, upper: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, value / upper)), 1)
