"""Write an evaluation as one self-contained HTML file.

Tables, box plots, and the worst cases as pictures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.evaluation.box_plots import draw_box_plots
from nnunetv2.evaluation.report_pictures import draw_case
from nnunetv2.evaluation.summary import LabelOrRegion, Results
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.file_endings import strip_ending

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

ClassNames = Mapping[LabelOrRegion, str]

METRICS = {"Dice": "", "IoU": "", "HD95": " (mm)", "ASSD": " (mm)", "SurfaceDice": ""}
"""Metrics that are shown, with their unit."""
_LOWER_IS_BETTER = {"HD95", "ASSD"}


def write_report(
    results: Results,
    path: str | os.PathLike[str],
    *,
    reader: BaseReaderWriter,
    file_ending: str,
    class_names: ClassNames | None = None,
    image_folder: str | None = None,
    num_worst: int = 6,
) -> None:
    """Write a report of the results of `compute_metrics_on_folder`.

    Args:
        path: The HTML file.
        reader: Reads label maps and images for the pictures.
        file_ending: Of label maps and images.
        class_names: Names of classes. Classes without a name are shown as in summary.json.
        image_folder: Images (CASE_0000...) to show below the labels of the worst cases.
        num_worst: So many cases are drawn: those with the lowest mean Dice.
    """
    names = {which: (class_names or {}).get(which, f"class {which}") for which in results["mean"]}
    metrics = [name for name in METRICS if name in next(iter(results["mean"].values()), {})]
    sections = [
        _overview(results, metrics),
        _table_of_classes(results, names, metrics),
        *(_box_plots(results, names, metric) for metric in metrics if metric != "IoU"),
        _worst_cases(results, names, reader, file_ending, image_folder, num_worst),
        _table_of_cases(results, names, metrics),
    ]
    page = _PAGE.format(
        title=f"Evaluation of {len(results['metric_per_case'])} cases",
        style=_STYLE,
        script=_SCRIPT,
        body="\n".join(sections),
    )
    with replacing(path) as written:
        written.write_text(page, encoding="utf-8")


def rank_cases(results: Results) -> list[tuple[float, dict]]:
    """Return (mean Dice over classes, case), lowest first.

    Cases without any class are left out.
    """
    ranked = []
    for case in results["metric_per_case"]:
        dice = [scores["Dice"] for scores in case["metrics"].values() if not math.isnan(scores["Dice"])]
        if dice:
            ranked.append((float(np.mean(dice)), case))
    return sorted(ranked, key=lambda pair: pair[0])


def _overview(results: Results, metrics: Sequence[str]) -> str:
    cases = results["metric_per_case"]
    folders = {what: str(Path(cases[0][f"{what}_file"]).parent) for what in ("prediction", "reference")}
    cards = "".join(
        f"<div class='card'><b>{_number(results['foreground_mean'][metric])}</b>"
        f"<span>mean {metric}{METRICS[metric]}</span></div>"
        for metric in metrics
    )
    tolerance = results.get("surface_tolerance_mm")
    note = "" if tolerance is None else f" Surfaces closer than {tolerance:g} mm agree in SurfaceDice."
    return (
        f"<p>{len(cases)} cases, {len(results['mean'])} classes.{note}<br>Predictions: "
        f"<code>{escape(folders['prediction'])}</code><br>References: <code>{escape(folders['reference'])}</code>"
        f"</p><div class='cards'>{cards}</div>"
    )


def _table_of_classes(results: Results, names: ClassNames, metrics: Sequence[str]) -> str:
    head = "".join(f"<th>{metric}{METRICS[metric]}</th>" for metric in metrics)
    rows = []
    for which, scores in results["mean"].items():
        known = sum(not math.isnan(case["metrics"][which]["Dice"]) for case in results["metric_per_case"])
        cells = "".join(_cell(metric, scores[metric]) for metric in metrics)
        rows.append(f"<tr><th scope='row'>{escape(names[which])}</th>{cells}<td>{known}</td></tr>")
    return (
        "<h2>Classes</h2><p>Means over the cases in which a score is defined. A class that is in neither map of a "
        "case has no score there.</p><div class='wide'><table class='sortable'><thead><tr><th>class</th>"
        f"{head}<th>cases</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _box_plots(results: Results, names: ClassNames, metric: str) -> str:
    values = {
        names[which]: [
            (case["metrics"][which][metric], Path(case["prediction_file"]).name) for case in results["metric_per_case"]
        ]
        for which in results["mean"]
    }
    upper = None if metric in _LOWER_IS_BETTER else 1.0
    return f"<h2>{metric}{METRICS[metric]}</h2>{draw_box_plots(values, upper)}"


def _worst_cases(
    results: Results,
    names: ClassNames,
    reader: BaseReaderWriter,
    file_ending: str,
    image_folder: str | None,
    num_worst: int,
) -> str:
    figures = []
    for dice, case in rank_cases(results)[:num_worst]:
        name = strip_ending(Path(case["prediction_file"]).name, file_ending)
        worst = min(
            (which for which in case["metrics"] if not math.isnan(case["metrics"][which]["Dice"])),
            key=lambda which: case["metrics"][which]["Dice"],
        )
        image = None if image_folder is None else os.path.join(image_folder, f"{name}_0000{file_ending}")
        picture, place = draw_case(case, list(results["mean"]), reader, image)
        caption = (
            f"<b>{escape(name)}</b> mean Dice {dice:.3f}, {place}; lowest: {escape(names[worst])} "
            f"{case['metrics'][worst]['Dice']:.3f}"
        )
        figures.append(
            f"<figure><img alt='reference and prediction of {escape(name)}' "
            f"src='data:image/png;base64,{picture}'><figcaption>{caption}</figcaption></figure>"
        )
    return (
        "<h2>Worst cases</h2><p>Left the reference, in the middle the prediction, right where they differ (red: "
        "missed, yellow: too much, blue: another class), in the slice where they differ most.</p>"
        f"<div class='figures'>{''.join(figures)}</div>"
    )


def _table_of_cases(results: Results, names: ClassNames, metrics: Sequence[str]) -> str:
    shown = [metric for metric in metrics if metric != "IoU"]
    classes = list(results["mean"])
    top = "".join(f"<th colspan='{len(shown)}'>{escape(names[which])}</th>" for which in classes)
    head = "".join(f"<th>{metric}</th>" for _ in classes for metric in shown)
    rows = []
    for case in results["metric_per_case"]:
        cells = "".join(_cell(metric, case["metrics"][which][metric]) for which in classes for metric in shown)
        rows.append(f"<tr><th scope='row'>{escape(Path(case['prediction_file']).name)}</th>{cells}</tr>")
    return (
        "<h2>Cases</h2><p>Click on a heading to sort.</p><div class='wide'><table class='sortable'><thead>"
        f"<tr><th></th>{top}</tr><tr><th>case</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(metric: str, value: float) -> str:
    if math.isnan(value):
        return "<td class='none'>-</td>"
    if metric in _LOWER_IS_BETTER:
        return f"<td>{_number(value)}</td>"
    hue = round(120 * min(1.0, max(0.0, value)))  # from red to green
    return f"<td style='background:hsl({hue} 65% 50% / .28)'>{_number(value)}</td>"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid var(--line)}
.cards{display:flex;flex-wrap:wrap;gap:.7rem}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.5rem 1rem}
.card b{font-size:1.4rem;display:block}
.wide{overflow:auto;max-height:80vh}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border:1px solid var(--line);padding:.2rem .5rem;text-align:right;white-space:nowrap}
th[scope=row]{text-align:left;font-weight:400}thead th{cursor:pointer;background:var(--soft)}.none{opacity:.5}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr));gap:1rem}
figure{margin:0}figure img{width:100%;image-rendering:pixelated;border:1px solid var(--line);background:#000}
svg{width:100%;max-width:1000px;height:auto;font-size:12px}svg text{fill:currentColor}
"""

_SCRIPT = """
document.querySelectorAll('table.sortable').forEach(table => {
  const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
  const value = (row, i) => { const text = row.cells[i].textContent, n = parseFloat(text);
    return i && text === '-' ? Infinity : i ? n : text; };
  [...heads].forEach((head, i) => head.addEventListener('click', () => {
    const up = head.dataset.up !== '1'; [...heads].forEach(h => delete h.dataset.up); head.dataset.up = up ? '1' : '0';
    const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = value(a, i), y = value(b, i);
      return (x > y ? 1 : x < y ? -1 : 0) * (up ? 1 : -1); });
    table.tBodies[0].append(...rows);
  }));
});
"""
