"""Write a comparison for readers: report.html without external assets, table.md, and result.json with every number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.comparison.conclusion import conclude
from nnunetv2.comparison.report_page import PAGE, STYLE
from nnunetv2.comparison.scores import (
    LOWER_IS_BETTER,
    METRICS,
    PLACES,
    POOLED,
    CaseValues,
    Place,
    Score,
    matrix,
    means_per_seed,
    values_per_case,
)
from nnunetv2.comparison.significance import Comparison, Estimate, compare_arms, estimate_mean
from nnunetv2.comparison.study import Study
from nnunetv2.comparison.study_folder import StudyFolder, test_case_name
from nnunetv2.evaluation.box_plots import draw_box_plots
from nnunetv2.evaluation.report_pictures import draw_case
from nnunetv2.evaluation.summary import load_summary_json
from nnunetv2.utilities.atomic_write import replacing, save_json_atomically
from nnunetv2.utilities.durations import format_duration

REPORT, TABLE, RESULT = "report.html", "table.md", "result.json"
NUM_WORST = 10
UNITS = {"Dice": "", "HD95": " (mm)", "SurfaceDice": ""}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All numbers of a comparison that the report shows."""

    study: Study
    scores: Sequence[Score]
    values: Mapping[tuple[Place, str], CaseValues]
    """Place and metric -> value per arm and case."""
    estimates: Mapping[tuple[Place, str], Mapping[str, Mapping[int | None, Estimate]]]
    """Place and metric -> arm -> number of the dataset, or None for the mean of all, -> estimate."""
    comparisons: Mapping[Place, Sequence[Comparison]]
    """Of Dice, with each place's correction."""
    seeds: Mapping[Place, Mapping[str, Mapping[int, float]]]
    """Mean Dice per arm and seed."""
    costs: Mapping[str, Sequence[Mapping[str, Any]]]


def find(study: Study, scores: Sequence[Score], costs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Findings:
    """Compute all that the report shows."""
    sites = {one.number: one.name for one in study.sites}
    # Where all are federated, they are switches of one method, and the first arm is the method without them.
    references = [arm.name for arm in study.arms if not arm.is_federated] or [study.arms[0].name]
    values: dict[tuple[Place, str], CaseValues] = {}
    for place in PLACES:
        for metric in METRICS:
            found = values_per_case(scores, sites, place, metric)
            if found:
                values[place, metric] = {arm.name: found[arm.name] for arm in study.arms if arm.name in found}
    return Findings(
        study=study,
        scores=scores,
        values=values,
        estimates={key: _estimate(arms) for key, arms in values.items()},
        comparisons={
            place: compare_arms(arms, references) for (place, metric), arms in values.items() if metric == "Dice"
        },
        seeds={place: means_per_seed(scores, sites, place, "Dice") for place in PLACES},
        costs=costs,
    )


def _estimate(arms: CaseValues) -> dict[str, dict[int | None, Estimate]]:
    """Estimate the means of every arm per dataset, and of all datasets where it has a value in each of them.

    A distance is not defined where nothing is predicted, so an arm may lack a dataset that others have.
    """
    estimates: dict[str, dict[int | None, Estimate]] = {}
    for arm, datasets in arms.items():
        estimates[arm] = {dataset: estimate_mean({dataset: cases}) for dataset, cases in datasets.items()}
        if all(datasets.keys() >= others.keys() for others in arms.values()):
            estimates[arm][None] = estimate_mean(datasets)
    return estimates


def _columns(arms: Mapping[str, Mapping[int | None, Estimate]]) -> list[int | None]:
    """Return the columns of a table: the datasets in their order, and None for the mean of all."""
    return [*sorted({one for estimates in arms.values() for one in estimates if one is not None}), None]


def write_report(findings: Findings, folder: StudyFolder) -> None:
    """Write report.html, table.md and result.json into the folder of a comparison."""
    save_json_atomically(as_json(findings), folder.path / RESULT, sort_keys=False)
    for name, text in ((TABLE, as_markdown(findings)), (REPORT, as_html(findings, folder))):
        with replacing(folder.path / name) as written:
            written.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ JSON
def as_json(findings: Findings) -> dict[str, Any]:
    """Return every number as plain JSON; undefined ones are null."""
    names = {one.number: one.name for one in findings.study.tested}
    content = {
        "conclusion": conclude(findings.study, findings.comparisons),
        "study": findings.study.as_json(),
        "estimates": [
            {"place": place, "metric": metric, "arm": arm, "dataset": names.get(dataset or -1), **asdict(estimate)}
            for (place, metric), arms in findings.estimates.items()
            for arm, datasets in arms.items()
            for dataset, estimate in datasets.items()
        ],
        "comparisons": [
            {"place": place, **asdict(one)} for place, several in findings.comparisons.items() for one in several
        ],
        "seeds": findings.seeds,
        "matrix": {arm.name: matrix(findings.scores, arm.name, "Dice") for arm in findings.study.arms},
        "costs": findings.costs,
        "scores": [asdict(score) for score in findings.scores],
    }
    plain: dict[str, Any] = json.loads(json.dumps(_without_nan(content)))
    return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# -------------------------------------------------------------------------------------------------------- Markdown
def as_markdown(findings: Findings) -> str:
    """Return the tables as Markdown."""
    parts = [conclude(findings.study, findings.comparisons)]
    for (place, metric), arms in findings.estimates.items():
        columns = _columns(arms)
        head = ["arm", *("mean" if number is None else _name(findings.study, number) for number in columns)]
        rows = [
            [arm, *(" ".join(_in_words(estimates.get(number), metric)).strip() for number in columns)]
            for arm, estimates in arms.items()
        ]
        parts.append(f"{metric}{UNITS[metric]} {PLACES[place]}\n\n{_markdown_table(head, rows)}")
    for place, comparisons in findings.comparisons.items():
        rows = [[one.arm, one.reference, *_told(one)] for one in comparisons]
        head = ["arm", "against", "difference in Dice", "cases", "p", "p (Holm)"]
        parts.append(f"Paired differences {PLACES[place]}\n\n{_markdown_table(head, rows)}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _told(one: Comparison) -> tuple[str, str, str, str]:
    return f"{one.difference:+.4f}", str(one.num_cases), _p(one.p), _p(one.p_holm)


def _verdict(one: Comparison) -> str:
    if not one.is_tested:
        return "-"
    if one.is_beyond_chance and not one.is_shown:
        return "ranks against the mean"
    return "yes" if one.is_shown else "no"


def _p(value: float) -> str:
    return "too few cases" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _in_words(estimate: Estimate | None, metric: str) -> tuple[str, str]:
    """Return a mean and its interval as texts; the interval is empty if there is none."""
    if estimate is None:
        return "-", ""
    digits = 2 if metric in LOWER_IS_BETTER else 3
    interval = "" if math.isnan(estimate.low) else f"({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
    return f"{estimate.mean:.{digits}f}", interval


def _name(study: Study, number: int) -> str:
    """Return the name of a dataset without its number, where that tells all of them apart."""
    short = {one.number: one.name.partition("_")[2] or one.name for one in study.tested}
    is_unique = len(set(short.values())) == len(short)
    return short[number] if is_unique else next(one.name for one in study.tested if one.number == number)


# ------------------------------------------------------------------------------------------------------------ HTML
def as_html(findings: Findings, folder: StudyFolder) -> str:
    """Return the report as one page without external assets."""
    study = findings.study
    sections = [
        _summary(findings),
        _overview(findings),
        *(_table(findings, place, metric) for place, metric in findings.estimates),
        _differences(findings),
        _matrices(findings),
        _boxes(findings),
        _worst_cases(findings, folder),
        _seeds(findings),
        _costs(findings),
        _settings(study),
    ]
    title = f"{len(study.arms)} ways to train, {len(study.sites)} sites"
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, sections)))


def _summary(findings: Findings) -> str:
    study = findings.study
    tested = {(score.dataset, score.case) for score in findings.scores}
    arms = "".join(
        f"<li><b>{escape(arm.name)}</b>: {escape(arm.describe(len(study.sites)))}</li>" for arm in study.arms
    )
    return (
        f"<p class='conclusion'>{escape(conclude(study, findings.comparisons))}</p>"
        f"<p>{len(study.sites)} sites, {len(tested)} test cases, {study.seeds} trainings of each kind (seeds), "
        f"{study.epochs} epochs of {study.iterations} iterations, configuration {escape(study.configuration)}.</p>"
        f"<ul>{arms}</ul>"
    )


def _overview(findings: Findings) -> str:
    """Show one line per arm: the mean Dice of all sites, wherever models were tested."""
    places = {place: arms for (place, metric), arms in findings.estimates.items() if metric == "Dice"}
    best = {place: _best(arms, None, "Dice") for place, arms in places.items()}
    head = "".join(f"<th>{PLACES[place]}</th>" for place in places)
    rows = []
    for arm in (one.name for one in findings.study.arms):
        cells = "".join(
            _estimate_cell(arms.get(arm, {}).get(None), "Dice", best[place]) for place, arms in places.items()
        )
        rows.append(f"<tr><th scope='row'>{escape(arm)}</th>{cells}</tr>")
    return (
        f"<h2>Mean Dice</h2><div class='wide'><table><thead><tr><th>model</th>{head}</tr></thead><tbody>{''.join(rows)}"
        "</tbody></table></div><p class='quiet'>In this table and those below: mean over cases, with its 95 % interval "
        "(bootstrap over cases; each case with the mean of its seeds). The best of a column is underlined. A dash "
        "stands where a metric is not defined, as a distance is without a prediction. Dice and surface Dice are 1 "
        "where neither reference nor prediction have a class.</p>"
    )


def _table(findings: Findings, place: Place, metric: str) -> str:
    arms = findings.estimates[place, metric]
    columns = _columns(arms)
    best = {number: _best(arms, number, metric) for number in columns}
    head = "".join(f"<th>{escape(_name(findings.study, number))}</th>" for number in columns if number is not None)
    rows = []
    for arm, estimates in arms.items():
        cells = "".join(_estimate_cell(estimates.get(number), metric, best[number]) for number in columns)
        rows.append(f"<tr><th scope='row'>{escape(arm)}</th>{cells}</tr>")
    counts = "".join(
        f"<td>{max((one[number].num_cases for one in arms.values() if number in one), default='-')}</td>"
        for number in columns
    )
    return (
        f"<h2>{metric}{UNITS[metric]} {PLACES[place]}</h2><div class='wide'><table><thead><tr><th>arm</th>{head}"
        f"<th>mean of these</th></tr></thead><tbody>{''.join(rows)}<tr class='quiet'><th scope='row'>cases</th>{counts}"
        "</tr></tbody></table></div>"
    )


def _best(arms: Mapping[str, Mapping[int | None, Estimate]], number: int | None, metric: str) -> float | None:
    """Return the best mean of a column; None where it has none."""
    means = [estimates[number].mean for estimates in arms.values() if number in estimates]
    return (min if metric in LOWER_IS_BETTER else max)(means, default=None)


def _estimate_cell(estimate: Estimate | None, metric: str, best: float | None) -> str:
    mean, interval = _in_words(estimate, metric)
    if estimate is not None and estimate.mean == best:
        mean = f"<u>{mean}</u>"
    return f"<td>{mean}<small>{interval}</small></td>"


def _differences(findings: Findings) -> str:
    parts = []
    for place, comparisons in findings.comparisons.items():
        if not comparisons:
            continue
        rows = "".join(
            f"<tr><th scope='row'>{escape(one.arm)} against {escape(one.reference)}</th>"
            + "".join(f"<td>{cell}</td>" for cell in _told(one))
            + f"<td>{_verdict(one)}</td></tr>"
            for one in comparisons
        )
        parts.append(
            f"<h3>{PLACES[place].capitalize()}</h3><div class='wide'><table><thead><tr><th>arms</th><th>difference "
            "in Dice</th>"
            "<th>cases</th><th>p</th><th>p (Holm)</th><th>beyond chance</th></tr></thead><tbody>"
            f"{rows}</tbody></table></div>"
        )
    if not parts:
        return ""
    return (
        "<h2>Paired differences</h2><p class='quiet'>Differences are the mean of the sites' means, as in the tables. "
        "Two-sided Wilcoxon signed-rank test on the same cases, corrected for the number of comparisons of each place "
        "(Holm). It ranks the cases by the size of their difference and adds up the ranks for and against an arm; "
        "where these contradict the mean, the last column says so. Cases of one patient are not independent of each "
        "other: if there are such, "
        f"the true p is larger.</p>{''.join(parts)}"
    )


def _matrices(findings: Findings) -> str:
    study, parts = findings.study, []
    for arm in study.arms:
        rows = []
        for model, datasets in matrix(findings.scores, arm.name, "Dice").items():
            cells = "".join(_shaded(datasets.get(one.number, math.nan)) for one in study.tested)
            whose = next((_name(study, one.number) for one in study.sites if one.name == model), model)
            rows.append(f"<tr><th scope='row'>{escape(whose)}</th>{cells}</tr>")
        head = "".join(f"<th>{escape(_name(study, one.number))}</th>" for one in study.tested)
        parts.append(
            f"<h3>{escape(arm.name)}</h3><div class='wide'><table class='matrix'><thead><tr><th>model of, tested "
            "at</th>"
            f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    return (
        "<h2>Every model at every site</h2><p class='quiet'>Mean Dice. A row is a model, a column the test cases of a "
        f"dataset; the bluer, the better.</p>{''.join(parts)}"
    )


def _shaded(value: float) -> str:
    if math.isnan(value):
        return "<td>-</td>"
    return f"<td style='--share:{100 * min(1.0, max(0.0, value)):.0f}%'>{value:.3f}</td>"


def _boxes(findings: Findings) -> str:
    parts = []
    for (place, metric), arms in findings.values.items():
        rows = {
            arm: [(value, case) for cases in datasets.values() for case, value in cases.items()]
            for arm, datasets in arms.items()
        }
        upper = None if metric in LOWER_IS_BETTER else 1.0
        plots = draw_box_plots(rows, upper)
        parts.append(f"<h3>{metric}{UNITS[metric]} {PLACES[place]}</h3><div class='wide'>{plots}</div>")
    return f"<h2>All cases</h2>{''.join(parts)}"


def _worst_cases(findings: Findings, folder: StudyFolder) -> str:
    """Draw the cases on which the last arm, which is federated as a rule, is worst at its own site."""
    study = findings.study
    arm = next((one for one in reversed(study.arms) if one.is_federated), study.arms[-1])
    seed = next((seed for seed in range(study.seeds) if folder.predicted(arm.name, seed, "").is_dir()), None)
    if seed is None:
        return f"<p class='quiet'>The predictions of {escape(arm.name)} lie where it was trained (--known).</p>"
    datasets = findings.values.get(("own", "Dice"), {}).get(arm.name, {})
    ranked = sorted((value, number, case) for number, cases in datasets.items() for case, value in cases.items())
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    figures = []
    for value, number, case in ranked[:NUM_WORST]:
        model = POOLED if arm.training == "pooled" else next(one.name for one in study.sites if one.number == number)
        summary = load_summary_json(folder.predicted(arm.name, seed, model) / "summary.json")
        content = study.sites[0].description()
        ending = content["file_ending"]
        [entry] = [one for one in summary["metric_per_case"] if Path(one["prediction_file"]).name == f"{case}{ending}"]
        reader = determine_reader_writer_from_dataset_json(content, entry["reference_file"], verbose=False)()
        files = {
            "prediction_file": str(folder.predicted(arm.name, seed, model) / f"{case}{ending}"),
            "reference_file": str(folder.tests / "labels" / f"{case}{ending}"),
        }
        image = folder.tests / "images" / f"{case}_0000{ending}"
        picture, place = draw_case({**entry, **files}, list(summary["mean"]), reader, str(image))
        original = case.removeprefix(test_case_name(next(d for d in study.tested if d.number == number), ""))
        figures.append(
            f"<figure><img alt='reference and prediction of {escape(original)}' src='data:image/png;base64,{picture}'>"
            f"<figcaption><b>{escape(original)}</b> of {escape(_name(study, number))}, mean Dice {value:.3f}, {place}"
            "</figcaption></figure>"
        )
    return (
        f"<h2>Worst cases of {escape(arm.name)}</h2><p class='quiet'>By the site's own model, seed {seed}. Left the "
        "reference, "
        "in the middle the prediction, right where they differ (red: missed, yellow: too much, blue: another "
        "class), in the "
        f"slice where they differ most.</p><div class='figures'>{''.join(figures)}</div>"
    )


def _seeds(findings: Findings) -> str:
    if findings.study.seeds < 2:
        return ""
    rows = []
    for place, arms in findings.seeds.items():
        for arm, seeds in arms.items():
            spread = float(np.ptp(list(seeds.values())))
            values = ", ".join(f"{value:.3f}" for value in seeds.values())
            rows.append(
                f"<tr><th scope='row'>{escape(arm)} {PLACES[place]}</th><td>{values}</td><td>{spread:.3f}</td></tr>"
            )
    return (
        "<h2>Seeds</h2><p class='quiet'>Mean Dice of each training. Differences between arms that are smaller than "
        "those "
        "between seeds say little, whatever p is.</p><div class='wide'><table><thead><tr><th>arm</th><th>per seed</th>"
        f"<th>range</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _costs(findings: Findings) -> str:
    rows = []
    for arm, costs in findings.costs.items():
        seconds = float(np.mean([cost["seconds"] for cost in costs]))
        sent = [cost["bytes"] for cost in costs if "bytes" in cost]
        traffic = f"{np.mean(sent) / 1e6:,.1f} MB" if sent else "none"
        rows.append(f"<tr><th scope='row'>{escape(arm)}</th><td>{format_duration(seconds)}</td><td>{traffic}</td></tr>")
    return (
        "<h2>What it took</h2><p class='quiet'>Per seed: all trainings of an arm side by side on one machine, "
        "which was perhaps another one for trainings from --known, and all bytes between the sites and the "
        "coordinator, both ways.</p><div class='wide'><table><thead><tr><th>arm</th>"
        f"<th>time of training</th><th>traffic</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _settings(study: Study) -> str:
    text = json.dumps(study.as_json(), indent=1)
    return f"<details><summary>All settings (study.json)</summary><pre>{escape(text)}</pre></details>"
