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
    count_undefined,
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
FORMATS_WITHOUT_SPACING = frozenset({".png", ".bmp"})


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All numbers of a comparison that the report shows."""

    study: Study
    scores: Sequence[Score]
    values: Mapping[tuple[Place, str], CaseValues]
    """Place and metric -> value per arm and case."""
    estimates: Mapping[tuple[Place, str], Mapping[str, Mapping[int | None, Estimate]]]
    """Place and metric -> arm -> number of the dataset, or None for the mean of all, -> estimate."""
    undefined: Mapping[tuple[Place, str], Mapping[str, int]]
    """Place and metric -> arm -> number of values that are not defined, and left out."""
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
            place: compare_arms(arms, references, _values_of_seeds(scores, sites, place))
            for (place, metric), arms in values.items()
            if metric == "Dice"
        },
        undefined={key: count_undefined(scores, sites, *key) for key in values},
        seeds={place: means_per_seed(scores, sites, place, "Dice") for place in PLACES},
        costs=costs,
    )


def _values_of_seeds(scores: Sequence[Score], sites: Mapping[int, str], place: Place) -> list[CaseValues]:
    seeds = sorted({score.seed for score in scores})
    return [values_per_case((one for one in scores if one.seed == seed), sites, place, "Dice") for seed in seeds]


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
        parts.append(f"{metric}{_unit(findings.study, metric)} {PLACES[place]}\n\n{_markdown_table(head, rows)}")
        if missing := _undefined_in_words(findings.undefined[place, metric]):
            parts.append(missing)
    for place, comparisons in findings.comparisons.items():
        rows = [[one.arm, one.reference, *_told(one)] for one in comparisons]
        head = ["arm", "against", *COLUMNS]
        parts.append(f"Paired differences {PLACES[place]}\n\n{_markdown_table(head, rows)}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


COLUMNS = ("difference in Dice", "95 % interval", "in each seed", "cases", "p", "p (Holm)", "shown")


def _told(one: Comparison) -> tuple[str, ...]:
    """Return the cells of a comparison: those of `COLUMNS`."""
    return (
        f"{one.difference:+.4f}",
        "-" if math.isnan(one.low) else f"{one.low:+.3f} to {one.high:+.3f}",
        ", ".join(f"{seed:+.3f}" for seed in one.per_seed) or "-",
        str(one.num_cases),
        _p(one.p),
        _p(one.p_holm),
        _verdict(one),
    )


def _verdict(one: Comparison) -> str:
    if not one.is_tested:
        return "-"
    if one.is_beyond_chance and one.objection:
        return f"no: {one.objection}"
    return "yes" if one.is_shown else "no"


def _undefined_in_words(counts: Mapping[str, int]) -> str:
    """Return a sentence on the values that are left out; empty if there are none."""
    several = ", ".join(f"{count} of {arm}" for arm, count in counts.items() if count)
    return several and (
        f"Values left out, as nothing is predicted (or nothing is there): {several}. An arm that misses more can look "
        "better here."
    )


def _p(value: float) -> str:
    return "too few cases" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _unit(study: Study, metric: str) -> str:
    if metric not in LOWER_IS_BETTER:
        return ""
    return " (pixels)" if study.sites[0].description()["file_ending"] in FORMATS_WITHOUT_SPACING else " (mm)"


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
    paragraphs = "".join(f"<p>{escape(one)}</p>" for one in conclude(study, findings.comparisons).split("\n\n"))
    return (
        f"<div class='conclusion'>{paragraphs}</div>"
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
        "(bootstrap over cases; each case with the mean of its seeds; none with fewer than six cases). Models that "
        "were trained together or on pooled scans have seen the other sites' training scans, models of one site have "
        "not: only hospitals that nobody trained on tell how a model does at a new one. The best of a column is "
        "underlined. A dash stands where a metric is not defined, as a distance is without a prediction. Dice and "
        "surface Dice are 1 where neither reference nor prediction have a class.</p>"
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
        f"<h2>{metric}{_unit(findings.study, metric)} {PLACES[place]}</h2><div class='wide'><table><thead><tr>"
        f"<th>arm</th>{head}<th>mean of these</th></tr></thead><tbody>{''.join(rows)}"
        f"<tr class='quiet'><th scope='row'>cases</th>{counts}"
        f"</tr></tbody></table></div><p class='quiet'>{_undefined_in_words(findings.undefined[place, metric])}</p>"
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
            + "".join(f"<td>{escape(cell)}</td>" for cell in _told(one))
            + "</tr>"
            for one in comparisons
        )
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        parts.append(
            f"<h3>{PLACES[place].capitalize()}</h3><div class='wide'><table><thead><tr><th>arms</th>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    if not parts:
        return ""
    return (
        "<h2>Paired differences</h2><p class='quiet'>Differences are the mean of the sites' means, as in the tables: "
        "every site counts alike. Their intervals come from a bootstrap over pairs. p is of a two-sided Wilcoxon "
        "signed-rank test of all pairs, corrected for the number of comparisons of each place (Holm): there, a site "
        "with many cases counts more. A difference counts as shown if the corrected p is below 0.05, the ranks have "
        "its sign, its interval does not hold 0, and all seeds agree on its sign. Cases of one patient are not "
        "independent of each other: if there are such, "
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
        parts.append(f"<h3>{metric}{_unit(findings.study, metric)} {PLACES[place]}</h3><div class='wide'>{plots}</div>")
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
