"""Score predicted label maps against references.

Overlaps per case and class and their means go into summary.json.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.case_files import first_reference, list_pairs
from nnunetv2.evaluation.confusion import are_whole, compute_confusion
from nnunetv2.evaluation.summary import (
    LabelOrRegion,
    Results,
    counted_labels,
    key_to_label_or_region,
    label_or_region_to_key,
    labels_of,
    labels_to_list_of_regions,
    load_summary_json,
    plain_class,
    save_summary_json,
    score_classes,
    summarize,
)
from nnunetv2.evaluation.surface_scores import score_surfaces
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.json_files import DATASET, read_json
from nnunetv2.utilities.map_cases import map_cases
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)

__all__ = [
    "key_to_label_or_region",
    "label_or_region_to_key",
    "labels_to_list_of_regions",
    "load_summary_json",
    "save_summary_json",
    "region_or_label_to_mask",
    "compute_tp_fp_fn_tn",
    "compute_metrics",
    "compute_metrics_on_folder",
    "compute_metrics_on_folder2",
    "compute_metrics_on_folder_simple",
    "evaluate_folder_entry_point",
    "evaluate_simple_entry_point",
]


def region_or_label_to_mask(segmentation: np.ndarray, region_or_label: LabelOrRegion) -> np.ndarray:
    """Return the mask of a class in a label map, as booleans."""
    return np.isin(segmentation, labels_of(region_or_label))


def compute_tp_fp_fn_tn(
    mask_ref: np.ndarray, mask_pred: np.ndarray, ignore_mask: np.ndarray | None = None
) -> tuple[int, int, int, int]:
    """Count true positives, false positives, false negatives and true negatives outside `ignore_mask`."""
    counted = np.ones_like(mask_ref, dtype=bool) if ignore_mask is None else ~ignore_mask.astype(bool)
    reference, prediction = mask_ref.astype(bool)[counted], mask_pred.astype(bool)[counted]
    return compute_confusion(reference, prediction).of_class([True])


def compute_metrics(
    reference_file: str,
    prediction_file: str,
    image_reader_writer: BaseReaderWriter,
    labels_or_regions: Sequence[LabelOrRegion],
    ignore_label: int | None = None,
    *,
    surface_tolerance_mm: float | None = None,
) -> Results:
    """Score one case.

    Each file is read once, and its voxels are counted in one pass.

    Args:
        image_reader_writer: Reads both files.
        labels_or_regions: The classes: single labels, or collections of labels that count as one.
        ignore_label: Voxels that the reference gives this label do not count.
        surface_tolerance_mm: If given, surfaces are compared too, with this tolerance; see `surface_distances`.

    Returns:
        `reference_file`, `prediction_file`, and `metrics`: class -> Dice, IoU (NaN if the class is in neither map)
        and counts of voxels, and if asked for HD95, ASSD and SurfaceDice.

    Raises:
        ValueError: The label maps differ in shape.
    """
    reference, properties = image_reader_writer.read_seg(reference_file)
    prediction, _ = image_reader_writer.read_seg(prediction_file)
    if reference.shape != prediction.shape:
        raise ValueError(
            f"{prediction_file} has shape {prediction.shape[1:]}, but its reference {reference_file} has "
            f"{reference.shape[1:]}; predictions are compared on the grid of the reference"
        )
    for file, labels in ((reference_file, reference), (prediction_file, prediction)):
        if not are_whole(labels):
            logger.warning("%s is no label map: it has values that are no whole numbers, and belong to no class", file)
    confusion = compute_confusion(reference, prediction, counted_labels(labels_or_regions, ignore_label))
    metrics = score_classes(confusion, labels_or_regions, ignore_label)
    if surface_tolerance_mm is not None:
        surfaces = score_surfaces(
            reference[0], prediction[0], labels_or_regions, properties["spacing"], surface_tolerance_mm, ignore_label
        )
        metrics = {which: {**scores, **surfaces[which]} for which, scores in metrics.items()}
    return {"reference_file": reference_file, "prediction_file": prediction_file, "metrics": metrics}


def compute_metrics_on_folder(
    folder_ref: str,
    folder_pred: str,
    output_file: str | None,
    image_reader_writer: BaseReaderWriter,
    file_ending: str,
    regions_or_labels: Sequence[LabelOrRegion],
    ignore_label: int | None = None,
    num_processes: int = default_num_processes,
    chill: bool = True,
    *,
    surface_tolerance_mm: float | None = None,
) -> Results:
    """Score all predictions of a folder.

    Args:
        output_file: Where the results are written too; ends in .json.
        file_ending: Of both references and predictions.
        num_processes: Cases that are worked on at the same time.
        chill: If False, every reference must have been predicted.
        surface_tolerance_mm: See `compute_metrics`.

    Returns:
        `metric_per_case` ordered by file name; `mean` per class, over the cases where it is defined; and
        `foreground_mean`, the mean over all classes but background for which it is defined. If surfaces are compared,
        also `surface_tolerance_mm`.

    Raises:
        AssertionError: `output_file` does not end in .json, or predictions are missing.
        FileNotFoundError: There is no prediction, or one without reference.
    """
    if output_file is not None:
        assert str(output_file).endswith(".json"), f"the output file must end in .json, got {output_file}"
    pairs = list_pairs(folder_ref, folder_pred, file_ending, chill=chill)
    score = partial(
        _score_pair,
        reader=image_reader_writer,
        classes=list(regions_or_labels),
        ignore_label=ignore_label,
        surface_tolerance_mm=surface_tolerance_mm,
    )
    files = None if surface_tolerance_mm is not None else [file for pair in pairs.values() for file in pair]
    per_case = list(map_cases(score, pairs, num_processes, files).values())
    results = {"metric_per_case": per_case, **summarize([case["metrics"] for case in per_case])}
    if surface_tolerance_mm is not None:
        results["surface_tolerance_mm"] = surface_tolerance_mm
    if output_file is not None:
        save_summary_json(results, output_file)
    return results


def _score_pair(
    prediction_file: str,
    reference_file: str,
    *,
    reader: BaseReaderWriter,
    classes: Sequence[LabelOrRegion],
    ignore_label: int | None,
    surface_tolerance_mm: float | None,
) -> Results:
    return compute_metrics(
        reference_file, prediction_file, reader, classes, ignore_label, surface_tolerance_mm=surface_tolerance_mm
    )


def compute_metrics_on_folder2(
    folder_ref: str,
    folder_pred: str,
    dataset_json_file: str,
    plans_file: str,
    output_file: str | None = None,
    num_processes: int = default_num_processes,
    chill: bool = False,
    *,
    surface_tolerance_mm: float | None = None,
    html_file: str | None = None,
    image_folder: str | None = None,
) -> None:
    """Score all predictions of a folder on the classes of a dataset.

    Results go into `folder_pred`/summary.json by default.

    Args:
        html_file: Where a report for readers is written too; see `report`.
        image_folder: Images to show in it under the label maps.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.plans.partial_labels import scored_classes
    from nnunetv2.plans.plans_manager import PlansManager

    dataset_json = read_json(dataset_json_file, required={**DATASET, "file_ending": str})
    ending = dataset_json["file_ending"]
    example = os.path.join(folder_ref, first_reference(folder_ref, [ending]))
    reader = determine_reader_writer_from_dataset_json(dataset_json, example)()
    labels = PlansManager(plans_file).get_label_manager(dataset_json)
    results = compute_metrics_on_folder(
        folder_ref,
        folder_pred,
        output_file or os.path.join(folder_pred, "summary.json"),
        reader,
        ending,
        scored_classes(labels, dataset_json),
        labels.ignore_label,
        num_processes,
        chill=chill,
        surface_tolerance_mm=surface_tolerance_mm,
    )
    if html_file is not None:
        _write_report(results, html_file, reader, ending, image_folder, dataset_json["labels"])


def compute_metrics_on_folder_simple(
    folder_ref: str,
    folder_pred: str,
    labels: Sequence[LabelOrRegion],
    output_file: str | None = None,
    num_processes: int = default_num_processes,
    ignore_label: int | None = None,
    chill: bool = False,
    *,
    surface_tolerance_mm: float | None = None,
    html_file: str | None = None,
    image_folder: str | None = None,
) -> None:
    """Score all predictions of a folder on these labels.

    The file format is that of the references.

    The last two arguments are those of `compute_metrics_on_folder2`.
    """
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_file_ending

    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    example = first_reference(folder_ref, sorted(known))
    # Of .nii.gz and .gz, say, the longer one.
    ending = max((ending for ending in known if example.lower().endswith(ending)), key=len)
    ending = example[-len(ending) :]
    reader = determine_reader_writer_from_file_ending(
        ending, os.path.join(folder_ref, example), allow_nonmatching_filename=True, verbose=False
    )()
    results = compute_metrics_on_folder(
        folder_ref,
        folder_pred,
        output_file or os.path.join(folder_pred, "summary.json"),
        reader,
        ending,
        labels,
        ignore_label,
        num_processes,
        chill=chill,
        surface_tolerance_mm=surface_tolerance_mm,
    )
    if html_file is not None:
        _write_report(results, html_file, reader, ending, image_folder, {})


def _write_report(
    results: Results,
    html_file: str,
    reader: BaseReaderWriter,
    ending: str,
    image_folder: str | None,
    label_names: dict[str, LabelOrRegion],
) -> None:
    from nnunetv2.evaluation.report import write_report

    names = {plain_class(value): name for name, value in label_names.items()}
    write_report(results, html_file, reader=reader, file_ending=ending, image_folder=image_folder, class_names=names)


def evaluate_folder_entry_point() -> None:
    """Run `nnUNetv2_evaluate_folder`."""

    def evaluate() -> None:
        args = build_folder_parser().parse_args()
        compute_metrics_on_folder2(
            args.gt_folder,
            args.pred_folder,
            args.djfile,
            args.pfile,
            args.o,
            args.np,
            chill=args.chill,
            **_read_extras(args),
        )
        _print_result(args)

    run_command(evaluate)


def evaluate_simple_entry_point() -> None:
    """Run `nnUNetv2_evaluate_simple`."""

    def evaluate() -> None:
        args = build_simple_parser().parse_args()
        compute_metrics_on_folder_simple(
            args.gt_folder, args.pred_folder, args.l, args.o, args.np, args.il, chill=args.chill, **_read_extras(args)
        )
        _print_result(args)

    run_command(evaluate)


def build_folder_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_evaluate_folder`."""
    parser = argparse.ArgumentParser(description="Score predictions on the classes of a dataset.")
    _add_folders(parser)
    parser.add_argument("-djfile", required=True, help="dataset.json of the dataset.")
    parser.add_argument("-pfile", required=True, help="plans.json of the model.")
    _add_common_options(parser)
    return parser


def build_simple_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_evaluate_simple`."""
    parser = argparse.ArgumentParser(description="Score predictions on given labels, without dataset.json and plans.")
    _add_folders(parser)
    parser.add_argument("-l", type=int, nargs="+", required=True, help="Labels to score, for example -l 1 2 3.")
    parser.add_argument("-il", type=int, default=None, help="Label of reference voxels that do not count.")
    _add_common_options(parser)
    return parser


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_folder", help="Folder of reference label maps.")
    parser.add_argument("pred_folder", help="Folder of predicted label maps, named as their references.")


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", default=None, help="Output file. Default: summary.json in the folder of predictions")
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        help=f"Cases worked on at the same time. Default: {default_num_processes}",
    )
    parser.add_argument("--chill", action="store_true", help="Accept that some references have not been predicted.")
    parser.add_argument(
        "--surface",
        action="store_true",
        help="Compare surfaces too, in mm: HD95, ASSD and SurfaceDice. Takes several times as long.",
    )
    parser.add_argument(
        "-tolerance",
        type=float,
        default=None,
        help="With --surface: surfaces closer than this (mm) agree in SurfaceDice. Default: 1",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="Write a report to look at beside the output file, with the same name and ending .html.",
    )
    parser.add_argument(
        "-images", default=None, help="With --html: folder of images (CASE_0000...) to show under the label maps."
    )


def _read_extras(args: argparse.Namespace) -> dict[str, Any]:
    if args.tolerance is not None and (not args.surface or not args.tolerance >= 0):
        raise ValueError("-tolerance is a distance in mm from 0 on, and needs --surface")
    if args.images is not None and not args.html:
        raise ValueError("-images needs --html")
    tolerance = 1.0 if args.tolerance is None else args.tolerance
    html_file = str(Path(_output_file(args)).with_suffix(".html")) if args.html else None
    return {
        "surface_tolerance_mm": tolerance if args.surface else None,
        "html_file": html_file,
        "image_folder": args.images,
    }


def _output_file(args: argparse.Namespace) -> str:
    return args.o or os.path.join(args.pred_folder, "summary.json")


def _print_result(args: argparse.Namespace) -> None:
    path = _output_file(args)
    show(f"mean foreground Dice {load_summary_json(path)['foreground_mean']['Dice']:.4f}, details in {path}")
    if args.html:
        show(f"report: {Path(path).with_suffix('.html')}")
