"""Draw the rooms of the package and the directions of their imports: python documentation/draw_rooms.py

Reads the layers from the contracts in pyproject.toml and the imports from the source, and writes rooms.svg beside this
file. Rooms stand in the order of their layers: what imports downwards is an arc on the right, what imports upwards, as
listed exceptions do, a dashed one on the left. Needs import-linter.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PICTURE = Path(__file__).with_name("rooms.svg")
PROJECT = Path(__file__).parents[1]

ROW, BOX_WIDTH, BOX_HEIGHT, GAP = 34, 190, 24, 14  # pixels
LEFT, TOP, PANEL_WIDTH = 100, 64, 560
DOWN, UP, BAND, INK = "#0072b2", "#d55e00", "#f2f4f6", "#222222"
STYLE = 'font-family="system-ui, sans-serif" font-size="13"'

Arrow = tuple[str, str]


@dataclass(frozen=True)
class Panel:
    """One package with its layers from top to bottom, and the number of imports between rooms."""

    package: str
    layers: Sequence[Sequence[str]]
    imports: Mapping[Arrow, int]

    @property
    def rooms(self) -> list[str]:
        return [room for layer in self.layers for room in layer]

    @property
    def tools(self) -> set[str]:
        """Rooms of the lowest layers from `configuration` or `errors` on, which all others use; without arcs."""
        rooms = self.rooms
        first = min(rooms.index(name) for name in ("configuration", "errors") if name in rooms)
        return set(rooms[first:])


def read_panels() -> list[Panel]:
    """Return a panel for each contract about the layers of one package."""
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    graph = grimp.build_graph("nnunetv2", exclude_type_checking_imports=False, cache_dir=None)
    return [
        Panel(package, layers := _read_layers(contract["layers"]), _count_imports(graph, package, layers))
        for contract in settings["contracts"]
        if contract["type"] == "layers"
        for package in contract.get("containers", ())
        if package in ("nnunetv2", "nnunetv2.federated")
    ]


def draw(panels: Sequence[Panel]) -> str:
    """Return the picture, panels side by side."""
    height = TOP + max(len(panel.rooms) * ROW + len(panel.layers) * GAP for panel in panels) + 16
    width = PANEL_WIDTH * len(panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"',
        f"{STYLE}>",
        "<title>Rooms of the package and the directions of their imports</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        lines += [f'<g transform="translate({number * PANEL_WIDTH} 0)">', *_draw_panel(panel), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _read_layers(layers: Sequence[str]) -> list[list[str]]:
    return [[room.strip(" ()") for room in layer.replace(":", "|").split("|")] for layer in layers]


def _count_imports(graph: grimp.ImportGraph, package: str, layers: Sequence[Sequence[str]]) -> dict[Arrow, int]:
    rooms = {room for layer in layers for room in layer}
    counts: Counter[Arrow] = Counter()
    for importer in sorted(graph.modules):
        for imported in graph.find_modules_directly_imported_by(importer):
            arrow = _room(importer, package), _room(imported, package)
            if arrow[0] != arrow[1] and rooms.issuperset(arrow):
                counts[arrow] += 1
    return dict(counts)


def _room(module: str, package: str) -> str:
    return module.removeprefix(f"{package}.").partition(".")[0] if module.startswith(f"{package}.") else ""


def _draw_panel(panel: Panel) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold" fill="{INK}">{escape(panel.package)}</text>'
    yield f'<text x="{LEFT}" y="44" fill="{INK}">imports: right downwards, left upwards (exceptions)</text>'
    places: dict[str, float] = {}
    y = TOP
    for layer in panel.layers:
        yield f'<rect x="{LEFT - 8}" y="{y}" width="{BOX_WIDTH + 16}" height="{len(layer) * ROW}" fill="{BAND}"/>'
        for room in layer:
            places[room] = y + ROW / 2
            yield from _draw_room(room, places[room], is_tool=room in panel.tools)
            y += ROW
        y += GAP
    for (importer, imported), count in sorted(panel.imports.items()):
        if imported not in panel.tools or places[importer] > places[imported]:
            yield _draw_arc(places[importer], places[imported], count, f"{importer} imports {imported}")


def _draw_room(room: str, y: float, *, is_tool: bool) -> Iterator[str]:
    label = f"{room} (all may)" if is_tool else room
    yield (
        f'<rect x="{LEFT}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4" fill="white" '
        f'stroke="{INK}"/>'
    )
    yield f'<text x="{LEFT + BOX_WIDTH / 2:g}" y="{y + 4:g}" text-anchor="middle" fill="{INK}">{escape(label)}</text>'


def _draw_arc(start: float, end: float, count: int, title: str) -> str:
    """Draw a half ellipse with an arrow head, downwards on the right and upwards on the left."""
    is_down = end > start
    side = 1 if is_down else -1
    x, colour = (LEFT + BOX_WIDTH, DOWN) if is_down else (LEFT, UP)
    start, end = start + side * 4, end - side * 4
    bulge = min(abs(end - start) * 0.42, 250 if is_down else 88)
    line = f'stroke="{colour}" stroke-opacity="0.75" stroke-width="{min(1 + count / 12, 3):.2f}"'
    line += "" if is_down else ' stroke-dasharray="4 3"'
    path = f"M {x} {start:g} C {x + side * bulge:g} {start:g} {x + side * bulge:g} {end:g} {x + side * 5} {end:g}"
    head = f"M {x} {end:g} l {side * 7} -4 v 8 z"
    return (
        f"<g><title>{escape(title)} ({count})</title>"
        f'<path d="{path}" fill="none" {line}/>'
        f'<path d="{head}" fill="{colour}"/></g>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(read_panels()), encoding="utf-8")
