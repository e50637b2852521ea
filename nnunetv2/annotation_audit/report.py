"""Write an audit as tables and as one self-contained HTML file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.annotation_audit.audit import Audit, RankedCase, RankedRegion, describe_offset
from nnunetv2.annotation_audit.disagreement import Figures
from nnunetv2.annotation_audit.doubtful import FEWEST_CASES
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.command_line import describe_error
from nnunetv2.utilities.plain_text import printable

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

JSON_FILE, CASES_FILE, REGIONS_FILE, HTML_FILE = "audit.json", "cases.csv", "regions.csv", "audit.html"
VERSION = 1
_REGIONS_PER_CASE = 3
_PANELS = ("label", "prediction", "image")


def write_tables(audit: Audit, folder: Path) -> None:
    """Write audit.json, cases.csv and regions.csv."""
    with replacing(folder / JSON_FILE) as written:
        written.write_text(json.dumps(describe(audit), indent=2, ensure_ascii=False), encoding="utf-8")
    classes = list(audit.classes)
    _write_csv(
        folder / CASES_FILE,
        [
            "rank",
            "case",
            "doubtful",
            "score",
            "class",
            "seen",
            *(f"{figure} {name}" for name in classes for figure in ("distance_mm", "offset_mm")),
        ],
        (
            [
                number,
                case.case,
                _yes(case.is_doubtful),
                f"{case.score:.3f}",
                case.class_name or "",
                _yes(case.is_seen),
                *(cell for name in classes for cell in _cells_of_figures(case.figures.get(name))),
            ]
            for number, case in enumerate(audit.cases, start=1)
        ),
    )
    _write_csv(
        folder / REGIONS_FILE,
        ["rank", "case", "kind", "class", "score", "distance_mm", "volume_mm3", "z", "y", "x", "description"],
        (
            [
                number,
                case.case,
                one.region.kind,
                one.region.class_name,
                f"{one.score:.3f}",
                f"{one.region.distance_mm:.3f}",
                f"{one.region.volume_mm3:.1f}",
                *one.region.centre,
                one.region.description,
            ]
            for number, (case, one) in enumerate(_rank_regions(audit), start=1)
        ),
    )


def describe(audit: Audit) -> dict[str, Any]:
    """Return an audit as the content of audit.json."""
    return {
        "version": VERSION,
        "dataset": audit.dataset,
        "model": audit.model,
        "cut": audit.cut,
        "false_alarms": audit.false_alarms,
        "usual": [
            {
                "seen": seen,
                "class": name,
                "distance_mm": usual.distance_mm,
                "offset_mm": usual.offset_mm,
                "doubtful_from_mm": usual.doubtful_from_mm(audit.cut),
            }
            for seen, classes in audit.usual.items()
            if any(case.is_seen == seen for case in audit.cases)
            for name, usual in classes.items()
        ],
        "cases": [
            {
                "case": case.case,
                "doubtful": case.is_doubtful,
                "score": case.score,
                "class": case.class_name,
                "seen": case.is_seen,
                "figures": {name: asdict(figures) for name, figures in case.figures.items()},
                "label_file": case.label_file,
                "prediction_file": case.prediction_file,
                "regions": [
                    {
                        "kind": one.region.kind,
                        "class": one.region.class_name,
                        "score": one.score,
                        "distance_mm": one.region.distance_mm,
                        "volume_mm3": one.region.volume_mm3,
                        "centre": list(one.region.centre),
                        "description": one.region.description,
                    }
                    for one in case.regions
                ],
            }
            for case in audit.cases
        ],
        "failed": audit.failed,
    }


def write_page(audit: Audit, folder: Path, reader: BaseReaderWriter, *, num_pictures: int) -> None:
    """Write the page, with pictures of so many of the most doubtful cases."""
    title = f"Doubtful annotations of {audit.dataset}"
    body = [_overview(audit), _doubtful_cases(audit, reader, num_pictures), _table(audit), _failures(audit)]
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(body))
    with replacing(folder / HTML_FILE) as written:
        written.write_text(page, encoding="utf-8")


def _overview(audit: Audit) -> str:
    cards = [
        (len(audit.doubtful), "doubtful"),
        (len(audit.cases), "cases compared"),
        (sum(case.is_seen for case in audit.cases), "seen in training"),
        (len(audit.failed), "not compared"),
    ]
    notes = [
        "Doubtful is a case whose label lies farther from the prediction than is usual here, or is too small or too "
        f"large all around: a score above {audit.cut:.2f}. Of a dataset without a mistake, about "
        f"{audit.false_alarms:.0%} would be listed. "
        "A doubtful label may be right, and the network wrong: please look."
    ]
    if len(audit.cases) < FEWEST_CASES:
        notes.append(
            f"<b>Fewer than {FEWEST_CASES} cases: what is usual is hardly known, so take the order, not the list.</b>"
        )
    if any(case.is_seen for case in audit.cases):
        notes.append(
            "Cases marked as seen were predicted by a network that may have learned from their labels, with their "
            "mistakes. Train all folds to see those, too."
        )
    return (
        f"<p>Model: <code>{_text(audit.model)}</code></p><div class='cards'>"
        + "".join(f"<div class='card'><b>{number}</b><span>{what}</span></div>" for number, what in cards)
        + "</div>"
        + "".join(f"<p>{note}</p>" for note in notes)
    )


def _doubtful_cases(audit: Audit, reader: BaseReaderWriter, num_pictures: int) -> str:
    if not audit.doubtful:
        return "<h2>Doubtful cases</h2><p>None.</p>"
    from nnunetv2.annotation_audit.pictures import colour_of

    labels = list(dict.fromkeys(label for values in audit.classes.values() for label in values))
    names = {values[0]: name for name, values in audit.classes.items() if len(values) == 1}
    legend = "".join(
        f"<span class='key'><i style='background:#{colour_of(number)}'></i>"
        f"{_text(names.get(label, f'label {label}'))}</span>"
        for number, label in enumerate(labels)
    )
    articles = [
        _article(number, case, audit, reader if number <= num_pictures else None, labels)
        for number, case in enumerate(audit.doubtful, start=1)
    ]
    return f"<h2>Doubtful cases</h2><p class='legend'>{legend}</p>{''.join(articles)}"


def _article(
    number: int, case: RankedCase, audit: Audit, reader: BaseReaderWriter | None, labels: Sequence[int]
) -> str:
    regions = [one for one in case.regions if one.score > audit.cut][:_REGIONS_PER_CASE] or case.regions[:1]
    rest = len(case.regions) - len(regions)
    figures = _figures(case, regions, reader, labels) if reader is not None else [""] * len(regions)
    items = "".join(
        f"<li><b class='{one.region.kind}'>{one.region.kind}</b> {_text(one.region.class_name)}: "
        f"{_text(one.region.description)}{figure}</li>"
        for one, figure in zip(regions, figures)
    )
    distances = "; ".join(
        f"{_text(name)} {figures.distance_mm:.2f} mm apart, {describe_offset(figures.offset_mm)}"
        for name, figures in case.figures.items()
    )
    seen = " <span class='tag'>seen in training</span>" if case.is_seen else ""
    more = f"<p class='soft'>{rest} more in {REGIONS_FILE}</p>" if rest else ""
    if not regions:
        items = f"<li>{_text(case.reason)}: no region of it differs from the prediction</li>"
    return (
        f"<article id='case-{number}'><h3>{number}. {_text(case.case)}{seen}</h3>"
        f"<p class='soft'>Score {case.score:.1f}; {distances}</p><ol>{items}</ol>{more}</article>"
    )


def _figures(
    case: RankedCase, regions: Sequence[RankedRegion], reader: BaseReaderWriter, labels: Sequence[int]
) -> list[str]:
    from nnunetv2.annotation_audit.pictures import CasePainter

    try:
        painter = CasePainter(case.label_file, case.prediction_file, case.image_files[0], reader)
    except Exception as error:  # noqa: BLE001  readers raise whatever their library raises; the page says it
        reason = f"<p class='soft'>No picture: {_text(describe_error(error))}</p>"
        return [reason, *[""] * (len(regions) - 1)]
    drawn = []
    for one in regions:
        panels, place = painter.draw(one.region.centre, labels)
        pictures = "".join(
            f"<figure><img alt='{what} of {_text(case.case)}' src='data:image/png;base64,{panel}'>"
            f"<figcaption>{what}</figcaption></figure>"
            for what, panel in zip(_PANELS, panels)
        )
        drawn.append(f"<div class='panels'>{pictures}</div><p class='soft'>{place}</p>")
    return drawn


def _table(audit: Audit) -> str:
    rows = []
    for number, case in enumerate(audit.cases, start=1):
        first = case.regions[0].region if case.regions else None
        what = "" if first is None else f"{first.kind}, {first.class_name}"
        name = _text(case.case)
        shown = f"<a href='#case-{number}'>{name}</a>" if case.is_doubtful else name
        rows.append(
            f"<tr class='{'doubtful' if case.is_doubtful else ''}'><td>{number}</td><th scope='row'>{shown}"
            f"{' (seen)' if case.is_seen else ''}</th><td>{case.score:.1f}</td><td class='left'>{_text(what)}</td></tr>"
        )
    return (
        "<h2>All cases</h2><div class='wide'><table><thead><tr><th></th><th scope='col' class='left'>case</th>"
        "<th scope='col'>score</th><th scope='col' class='left'>largest region</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _failures(audit: Audit) -> str:
    if not audit.failed:
        return ""
    items = "".join(f"<li><b>{_text(case)}</b>: {_text(reason)}</li>" for case, reason in audit.failed.items())
    return f"<h2>Not compared</h2><ul>{items}</ul>"


def _rank_regions(audit: Audit) -> list[tuple[RankedCase, RankedRegion]]:
    pairs = [(case, one) for case in audit.cases for one in case.regions]
    return sorted(pairs, key=lambda pair: -pair[1].score)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with replacing(path) as written, written.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([_cell(one) for one in head])
        writer.writerows([_cell(one) for one in row] for row in rows)


def _cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t") or (text[:1] == "-" and not _is_number(text)) else text


def _cells_of_figures(figures: Figures | None) -> tuple[str, str]:
    return ("", "") if figures is None else (f"{figures.distance_mm:.3f}", f"{figures.offset_mm:.3f}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _text(value: object) -> str:
    return escape(printable(value))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:light-dark(#555,#aaa);--mark:light-dark(#b3261e,#ff8a80)}
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:0}.soft{color:var(--soft);font-size:.9rem;margin:.2rem 0}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}.card{border:1px solid var(--line);border-radius:.5rem;padding:.4rem .9rem}
.card b{font-size:1.4rem;display:block}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}
.tag{font-size:.8rem;font-weight:400;border:1px solid var(--line);border-radius:.5rem;padding:0 .4rem}
article{border:1px solid var(--line);border-radius:.5rem;padding:.7rem 1rem;margin:1rem 0}
ol{padding-left:1.2rem;margin:.4rem 0}li b{color:var(--mark)}
.panels{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.5rem;margin-top:.4rem;max-width:820px}
@media(max-width:480px){.panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
figure{margin:0}img{width:100%;display:block;background:#000}figcaption{font-size:.85rem;color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{border-bottom:1px solid var(--line);padding:.25rem .5rem;text-align:right;vertical-align:top}
th[scope=row],.left{text-align:left;font-weight:400}.doubtful th,.doubtful td{font-weight:600}
a{color:inherit}
"""
