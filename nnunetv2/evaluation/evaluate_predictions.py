"""Score predicted label maps against references: overlap per case and class, and their means in summary.json."""
from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.confusion import compute_confusion
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.device import usable_cpu_count
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)

LabelOrRegion = int | Sequence[int]
Results = dict[str, Any]


def label_or_region_to_key(label_or_region: LabelOrRegion) -> str:
    """Return the key of a class in summary.json: "1", or "(1, 2, 3)" for a region."""
    return str(_plain_key(label_or_region))


def key_to_label_or_region(key: str) -> LabelOrRegion:
    """Return the class that a key in summary.json stands for: an int, or a tuple of them."""
    try:
        return int(key)
    except ValueError:
        return tuple(int(part) for part in key.strip("() ").split(",") if part.strip())


def save_summary_json(results: Results, output_file: str | os.PathLike[str]) -> None:
    """Write results, keys sorted; numbers that are not defined are written as NaN. `results` stays unchanged."""
    plain = deepcopy(results)
    plain["mean"] = _with_keys(plain["mean"], label_or_region_to_key)
    for case in plain["metric_per_case"]:
        case["metrics"] = _with_keys(case["metrics"], label_or_region_to_key)
    recursive_fix_for_json_export(plain)
    save_json_atomically(plain, output_file)


def load_summary_json(filename: str | os.PathLike[str]) -> Results:
    """Read results as they were before `save_summary_json`: classes are ints and tuples again."""
    results = json.loads(Path(filename).read_text(encoding="utf-8"))
    results["mean"] = _with_keys(results["mean"], key_to_label_or_region)
    for case in results["metric_per_case"]:
        case["metrics"] = _with_keys(case["metrics"], key_to_label_or_region)
    return results


def labels_to_list_of_regions(labels: Iterable[int]) -> list[tuple[int, ...]]:
    """Return each label as a region of its own: [1, 2] becomes [(1,), (2,)]."""
    return [(label,) for label in labels]


def region_or_label_to_mask(segmentation: np.ndarray, region_or_label: LabelOrRegion) -> np.ndarray:
    """Return where a label map has one of the labels of a class, as booleans of the same shape."""
    return np.isin(segmentation, _labels_of(region_or_label))


def compute_tp_fp_fn_tn(mask_ref: np.ndarray, mask_pred: np.ndarray,
                        ignore_mask: np.ndarray | None = None) -> tuple[int, int, int, int]:
    """Count true positives, false positives, false negatives and true negatives outside `ignore_mask`."""
    counted = np.ones_like(mask_ref, dtype=bool) if ignore_mask is None else ~ignore_mask.astype(bool)
    reference, prediction = mask_ref.astype(bool)[counted], mask_pred.astype(bool)[counted]
    return compute_confusion(reference, prediction).of_class([True])


def compute_metrics(reference_file: str, prediction_file: str, image_reader_writer: BaseReaderWriter,
                    labels_or_regions: Sequence[LabelOrRegion], ignore_label: int | None = None) -> Results:
    """Score one case.

    Args:
        image_reader_writer: Reads both files.
        labels_or_regions: The classes: single labels, or collections of labels that count as one.
        ignore_label: Voxels that the reference gives this label do not count.

    Returns:
        `reference_file`, `prediction_file`, and `metrics`: class -> Dice, IoU (NaN if the class is in neither map)
        and counts of voxels.

    Raises:
        ValueError: The label maps differ in shape.
    """
    reference, _ = image_reader_writer.read_seg(reference_file)
    prediction, _ = image_reader_writer.read_seg(prediction_file)
    if reference.shape != prediction.shape:
        raise ValueError(f"{prediction_file} has shape {prediction.shape[1:]}, but its reference {reference_file} has "
                         f"{reference.shape[1:]}; predictions are compared on the grid of the reference")
    confusion = compute_confusion(reference, prediction)
    if ignore_label is not None:
        confusion = confusion.without_reference(ignore_label)
    metrics = {_plain_key(which): _scores(*confusion.of_class(_labels_of(which))) for which in labels_or_regions}
    return {"reference_file": reference_file, "prediction_file": prediction_file, "metrics": metrics}


def compute_metrics_on_folder(folder_ref: str, folder_pred: str, output_file: str | None,
                              image_reader_writer: BaseReaderWriter, file_ending: str,
                              regions_or_labels: Sequence[LabelOrRegion], ignore_label: int | None = None,
                              num_processes: int = default_num_processes, chill: bool = True) -> Results:
    """Score all predictions of a folder.

    Args:
        output_file: Where the results are written too; ends in .json.
        file_ending: Of both references and predictions.
        num_processes: Cases that are worked on at the same time.
        chill: If False, every reference must have been predicted.

    Returns:
        `metric_per_case` ordered by file name; `mean` per class, over the cases where it is defined; and
        `foreground_mean`, the mean over all classes but background for which it is defined.

    Raises:
        AssertionError: `output_file` does not end in .json, or predictions are missing.
        FileNotFoundError: There is no prediction, or one without reference.
    """
    if output_file is not None:
        assert str(output_file).endswith(".json"), f"the output file must end in .json, got {output_file}"
    names = _list_names(folder_pred, file_ending)
    _check_names(names, _list_names(folder_ref, file_ending), folder_ref, folder_pred, file_ending, chill)

    def score(name: str) -> Results:
        return compute_metrics(os.path.join(folder_ref, name), os.path.join(folder_pred, name), image_reader_writer,
                               regions_or_labels, ignore_label)

    # Threads: readers spend their time outside of the interpreter lock, and processes would take longer to start
    # than most folders take to score.
    with ThreadPoolExecutor(max(1, min(num_processes, usable_cpu_count())), "evaluation") as pool:
        per_case = list(pool.map(score, names))
    results = {"metric_per_case": per_case, **summarize([case["metrics"] for case in per_case])}
    if output_file is not None:
        save_summary_json(results, output_file)
    return results


def summarize(metrics_of_cases: Sequence[Mapping[LabelOrRegion, Mapping[str, float]]]) -> Results:
    """Return the means over cases (`mean`, per class) and over foreground classes (`foreground_mean`)."""
    first = metrics_of_cases[0]
    mean = {which: {name: _nanmean([metrics[which][name] for metrics in metrics_of_cases]) for name in scores}
            for which, scores in first.items()}
    foreground = [which for which in mean if which not in (0, "0")]
    undefined = [label_or_region_to_key(which) for which in foreground if np.isnan(mean[which]["Dice"])]
    if undefined:
        logger.warning("class %s is in no reference and no prediction: the foreground mean is over the other classes",
                       ", ".join(undefined))
    names = next(iter(first.values())) if first else ()
    return {"mean": mean,
            "foreground_mean": {name: _nanmean([mean[which][name] for which in foreground]) for name in names}}


def compute_metrics_on_folder2(folder_ref: str, folder_pred: str, dataset_json_file: str, plans_file: str,
                               output_file: str | None = None, num_processes: int = default_num_processes,
                               chill: bool = False) -> None:
    """Score all predictions of a folder on the classes of a dataset, into `folder_pred`/summary.json by default."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json = json.loads(Path(dataset_json_file).read_text(encoding="utf-8"))
    ending = dataset_json["file_ending"]
    example = os.path.join(folder_ref, _first_reference(folder_ref, [ending]))
    reader = determine_reader_writer_from_dataset_json(dataset_json, example)()
    labels = PlansManager(plans_file).get_label_manager(dataset_json)
    compute_metrics_on_folder(
        folder_ref, folder_pred, output_file or os.path.join(folder_pred, "summary.json"), reader, ending,
        labels.foreground_regions if labels.has_regions else labels.foreground_labels, labels.ignore_label,
        num_processes, chill=chill)


def compute_metrics_on_folder_simple(folder_ref: str, folder_pred: str, labels: Sequence[LabelOrRegion],
                                     output_file: str | None = None, num_processes: int = default_num_processes,
                                     ignore_label: int | None = None, chill: bool = False) -> None:
    """Score all predictions of a folder on these labels; the file format is that of the references."""
    from nnunetv2.imageio.reader_writer_registry import (
        LIST_OF_IO_CLASSES,
        determine_reader_writer_from_file_ending,
    )

    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    example = _first_reference(folder_ref, sorted(known))
    # Of .nii.gz and .gz, say, the longer one.
    ending = max((ending for ending in known if example.lower().endswith(ending)), key=len)
    ending = example[-len(ending):]
    reader = determine_reader_writer_from_file_ending(ending, os.path.join(folder_ref, example),
                                                      allow_nonmatching_filename=True, verbose=False)()
    compute_metrics_on_folder(folder_ref, folder_pred, output_file or os.path.join(folder_pred, "summary.json"), reader,
                              ending, labels, ignore_label, num_processes, chill=chill)


def evaluate_folder_entry_point() -> None:
    """Run `nnUNetv2_evaluate_folder`."""
    def evaluate() -> None:
        args = build_folder_parser().parse_args()
        compute_metrics_on_folder2(args.gt_folder, args.pred_folder, args.djfile, args.pfile, args.o, args.np,
                                   chill=args.chill)
        _print_result(args)

    run_command(evaluate)


def evaluate_simple_entry_point() -> None:
    """Run `nnUNetv2_evaluate_simple`."""
    def evaluate() -> None:
        args = build_simple_parser().parse_args()
        compute_metrics_on_folder_simple(args.gt_folder, args.pred_folder, args.l, args.o, args.np, args.il,
                                         chill=args.chill)
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
    parser.add_argument("-np", type=int, default=default_num_processes,
                        help=f"Cases worked on at the same time. Default: {default_num_processes}")
    parser.add_argument("--chill", action="store_true", help="Accept that some references have not been predicted.")


def _print_result(args: argparse.Namespace) -> None:
    path = args.o or os.path.join(args.pred_folder, "summary.json")
    print(f"mean foreground Dice {load_summary_json(path)['foreground_mean']['Dice']:.4f}, details in {path}")


def _scores(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    found_or_wanted = tp + fp + fn
    return {"Dice": 2 * tp / (2 * tp + fp + fn) if found_or_wanted else np.nan,
            "IoU": tp / found_or_wanted if found_or_wanted else np.nan,
            "FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": fp + tp, "n_ref": fn + tp}


def _nanmean(values: Sequence[float]) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _labels_of(label_or_region: LabelOrRegion) -> list[int]:
    return [label_or_region] if np.ndim(label_or_region) == 0 else list(label_or_region)


def _plain_key(label_or_region: LabelOrRegion | str) -> LabelOrRegion | str:
    """Return a label as int and a region as tuple of ints; their NumPy kin print differently."""
    if isinstance(label_or_region, str):
        return label_or_region
    if np.ndim(label_or_region) == 0:
        return int(label_or_region)
    return tuple(int(label) for label in label_or_region)


def _with_keys(values: Mapping, change: Any) -> dict:
    return {change(key): value for key, value in values.items()}


def _list_names(folder: str, file_ending: str) -> list[str]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(entry.name for entry in Path(folder).iterdir()
                  if entry.name.endswith(file_ending) and entry.is_file())


def _first_reference(folder_ref: str, endings: Sequence[str]) -> str:
    names = [name for name in _list_names(folder_ref, "") if name.lower().endswith(tuple(endings))]
    if not names:
        raise FileNotFoundError(f"no reference found in {folder_ref}: no file ends in {', '.join(endings)}")
    return names[0]


def _check_names(predicted: Sequence[str], references: Sequence[str], folder_ref: str, folder_pred: str,
                 file_ending: str, chill: bool) -> None:
    missing = sorted(set(references) - set(predicted))
    if missing and not chill:
        raise AssertionError(f"{len(missing)} of {len(references)} references in {folder_ref} have no prediction in "
                             f"{folder_pred}: {_shorten(missing)}. Pass --chill (chill=True) to score the others alone")
    if not predicted:
        raise FileNotFoundError(f"no prediction found in {folder_pred}: no file ends in {file_ending}")
    strangers = sorted(set(predicted) - set(references))
    if strangers:
        raise FileNotFoundError(f"{len(strangers)} of {len(predicted)} predictions in {folder_pred} have no reference "
                                f"in {folder_ref}: {_shorten(strangers)}")


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
