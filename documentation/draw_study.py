"""Draw models and sites of comparisons: python documentation/draw_study.py TITLE=RESULT.json --arms ARM=TITLE

Reads what `nnUNetv2_fed_compare` wrote and puts models-and-sites.svg beside this file. A square per arm: a row is the
model of a site, a column the test cases of a site, the number their mean Dice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).with_name("models-and-sites.svg")
CELL_WIDTH, CELL_HEIGHT, LABEL, GAP, TOP = 58, 26, 84, 36, 58  # pixels
INK, DEEP = "#222222", "#0072b2"
STYLE = 'font-family="system-ui, sans-serif" font-size="13"'


def draw(studies: Mapping[str, Mapping[str, Any]], arms: Mapping[str, str]) -> str:
    """Return the picture, a line of squares per study.

    Args:
        studies: Title -> content of a result.json.
        arms: Name of an arm -> its title.
    """
    lines: list[str] = []
    width = y = 0
    for title, result in studies.items():
        names = [_short(site["name"]) for site in result["study"]["sites"]]
        size = LABEL + len(names) * CELL_WIDTH
        lines.append(f'<text x="0" y="{y + 18}" font-size="15" font-weight="bold" fill="{INK}">{escape(title)}</text>')
        for number, (arm, arm_title) in enumerate(arms.items()):
            lines.append(f'<g transform="translate({number * (size + GAP)} {y + TOP})">')
            lines += _draw_square(names, _means(result, arm), arm_title)
            lines.append("</g>")
        width = max(width, len(arms) * (size + GAP) - GAP)
        y += TOP + (len(names) + 1) * CELL_HEIGHT + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" {STYLE}>'
    title = f"<title>Mean Dice of the models of sites at the sites, {escape(', '.join(arms.values()))}</title>"
    return "\n".join([head, title, f'<rect width="{width}" height="{y}" fill="white"/>', *lines, "</svg>", ""])


def _short(dataset: str) -> str:
    return dataset.partition("_")[2] or dataset


def _means(result: Mapping[str, Any], arm: str) -> list[list[float]]:
    """Return the mean Dice of an arm: a row per model, a column per site."""
    sites = result["study"]["sites"]
    numbers = [site["name"].removeprefix("Dataset").partition("_")[0].lstrip("0") for site in sites]
    return [[result["matrix"][arm][site["name"]][number] for number in numbers] for site in sites]


def _draw_square(names: Sequence[str], means: Sequence[Sequence[float]], title: str) -> Iterator[str]:
    yield f'<text x="{LABEL}" y="-18" fill="{INK}">{escape(title)}</text>'
    for column, name in enumerate(names):
        x = LABEL + (column + 0.5) * CELL_WIDTH
        yield f'<text x="{x:g}" y="16" text-anchor="middle" fill="{INK}">{escape(name)}</text>'
    for row, (name, values) in enumerate(zip(names, means), 1):
        y = row * CELL_HEIGHT
        yield f'<text x="{LABEL - 8}" y="{y + 17}" text-anchor="end" fill="{INK}">{escape(name)}</text>'
        for column, value in enumerate(values):
            x = LABEL + column * CELL_WIDTH
            frame = f' stroke="{INK}" stroke-width="1.5"' if column == row - 1 else ""  # the site's own model
            yield (
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{DEEP}" '
                f'fill-opacity="{0.6 * value:.2f}"{frame}/>'
            )
            middle = f'x="{x + CELL_WIDTH / 2 - 1:g}" text-anchor="middle"'
            yield f'<text {middle} y="{y + 17}" fill="{INK}">{value:.2f}</text>'


def main() -> None:
    """Draw the studies that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="TITLE=RESULT.json")
    parser.add_argument("--arms", nargs="+", metavar="ARM=TITLE", required=True)
    arguments = parser.parse_args()
    files = dict(text.split("=", 1) for text in arguments.studies)
    studies = {title: json.loads(Path(file).read_text(encoding="utf-8")) for title, file in files.items()}
    PICTURE.write_text(draw(studies, dict(text.split("=", 1) for text in arguments.arms)), encoding="utf-8")


if __name__ == "__main__":
    main()
