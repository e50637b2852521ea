"""Look for doubtful annotations in a dataset: the command nnUNetv2_audit_annotations.

Nothing of it leaves the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.command_line import add_device_option, run_command
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from nnunetv2.annotation_audit.audit import Audit, CaseFiles
    from nnunetv2.annotation_audit.predictions import Fold
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

PREDICTIONS = "predictions"
_SHOWN = 20


def audit_entry_point() -> None:
    """Run `nnUNetv2_audit_annotations`."""
    run_command(main)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_audit_annotations`."""
    parser = argparse.ArgumentParser(
        description="Rank the labels of a dataset by how far they lie from what networks predict that have not learned "
        "from them, and write tables and a page with pictures. Nothing leaves this machine."
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="Dataset: number or name.")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer class name. Default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans identifier. Default: nnUNetPlans")
    parser.add_argument(
        "-c", help="Configuration, for example 3d_fullres. Default: the only one that has been trained."
    )
    parser.add_argument(
        "-m",
        metavar="FOLDER",
        help="Model folder in place of -tr, -p and -c, for example the common model of a federation.",
    )
    parser.add_argument(
        "--unseen",
        action="store_true",
        help="With -m: the model was trained elsewhere and has seen none of these cases; all folds predict each.",
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", help="File name of the checkpoint. Default: checkpoint_final.pth"
    )
    parser.add_argument(
        "-o", metavar="FOLDER", help="Where the report goes. Default: annotation_audit beside the folds."
    )
    parser.add_argument(
        "--false_alarms",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="Share of the cases that would be listed if no label were wrong; a longer list finds more. Default: 0.01",
    )
    parser.add_argument("--pictures", type=int, default=30, metavar="N", help="Cases that are drawn. Default: 30")
    parser.add_argument("-np", type=int, default=default_num_processes, help="Processes that compare label maps.")
    add_device_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, audit, and return 1 if some case could not be compared."""
    args = build_parser().parse_args(argv)
    if not 0 < args.false_alarms < 1:
        raise ValueError(f"--false_alarms is {args.false_alarms}: expected a share between 0 and 1, such as 0.01")
    if args.unseen and args.m is None:
        raise ValueError("--unseen is for a model from elsewhere: name its folder with -m")
    return audit_annotations(
        args.d,
        trainer=args.tr,
        plans=args.p,
        configuration=args.c,
        model_folder=args.m,
        is_unseen=args.unseen,
        checkpoint=args.chk,
        output=args.o,
        false_alarms=args.false_alarms,
        num_pictures=args.pictures,
        num_processes=args.np,
        device_name=args.device,
    )


def audit_annotations(
    dataset_name_or_id: int | str,
    *,
    trainer: str = "nnUNetTrainer",
    plans: str = "nnUNetPlans",
    configuration: str | None = None,
    model_folder: str | None = None,
    is_unseen: bool = False,
    checkpoint: str = "checkpoint_final.pth",
    output: str | None = None,
    false_alarms: float = 0.01,
    num_pictures: int = 30,
    num_processes: int = default_num_processes,
    device_name: str = "cuda",
) -> int:
    """Compare the labels of a raw dataset with a model's predictions, and write the report.

    Args:
        model_folder: In place of trainer, plans and configuration.
        is_unseen: The model has seen none of these cases.
        output: Folder of the report; default: `annotation_audit` in the model's.
        false_alarms: Share of the cases of a flawless dataset that would be listed.
        num_pictures: So many cases are drawn.

    Returns:
        The number of cases that could not be compared, at most 1.

    Raises:
        InvalidInputError: There is no such model, or it is one for other labels or channels.
        FileNotFoundError: There is no raw dataset.
    """
    from nnunetv2.annotation_audit.report import write_page, write_tables
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.json_files import DATASET, read_json

    dataset = maybe_convert_to_dataset_name(dataset_name_or_id)
    raw, dataset_json = _read_raw_dataset(dataset)
    folder, folds = _find_model(dataset, trainer, plans, configuration, model_folder, checkpoint)
    _require_same_task(read_json(folder / "dataset.json", required=DATASET), dataset_json, folder, raw)
    cases = _labelled_cases(raw, dataset_json)
    target = folder / "annotation_audit" if output is None else Path(output)

    files = _predict_cases(
        cases,
        dataset,
        folder=folder,
        folds=folds,
        checkpoint=checkpoint,
        is_unseen=is_unseen,
        file_ending=dataset_json["file_ending"],
        output=target / PREDICTIONS,
        num_processes=num_processes,
        device_name=device_name,
    )
    reader = determine_reader_writer_from_dataset_json(
        dataset_json, next(iter(cases.values()))["images"][0], allow_nonmatching_filename=True, verbose=False
    )()
    audit = _rank_cases(
        files, dataset, dataset_json, folder, reader, false_alarms=false_alarms, num_processes=num_processes
    )
    write_tables(audit, target)
    write_page(audit, target, reader, num_pictures=num_pictures)
    _show_result(audit, target)
    return int(bool(audit.failed))


def _read_raw_dataset(dataset: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a raw dataset and its dataset.json.

    Raises:
        FileNotFoundError: There is none.
    """
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.json_files import DATASET, read_json

    raw = Path(nnUNet_raw.require()) / dataset
    if not (raw / "dataset.json").is_file():
        raise FileNotFoundError(f"{raw / 'dataset.json'} is missing: labels and images are read from the raw dataset")
    return raw, read_json(raw / "dataset.json", required=DATASET)


def _find_model(
    dataset: str, trainer: str, plans: str, configuration: str | None, model_folder: str | None, checkpoint: str
) -> tuple[Path, list[Fold]]:
    """Return the folder of the model and its trained folds.

    Raises:
        InvalidInputError: There is no such model.
    """
    from nnunetv2.annotation_audit.predictions import find_folds, find_model_folder
    from nnunetv2.errors import InvalidInputError
    from nnunetv2.paths import nnUNet_results

    if model_folder is None:
        folder = find_model_folder(
            Path(nnUNet_results.require()),
            dataset,
            trainer=trainer,
            plans=plans,
            configuration=configuration,
            checkpoint=checkpoint,
        )
    else:
        folder = Path(model_folder)
    folds = find_folds(folder, checkpoint)
    if not folds:
        raise InvalidInputError(f"{folder} is no model folder: it has no fold with a {checkpoint}")
    return folder, folds


def _predict_cases(
    cases: Mapping[str, Mapping[str, Any]],
    dataset: str,
    *,
    folder: Path,
    folds: Sequence[Fold],
    checkpoint: str,
    is_unseen: bool,
    file_ending: str,
    output: Path,
    num_processes: int,
    device_name: str,
) -> dict[str, CaseFiles]:
    """Return the files of every case; predictions that no training has left are made in `output`."""
    from nnunetv2.annotation_audit.audit import CaseFiles
    from nnunetv2.annotation_audit.predictions import plan_predictions, predict_missing
    from nnunetv2.utilities.device import resolve_device, set_torch_threads

    output.mkdir(parents=True, exist_ok=True)
    planned = plan_predictions(
        cases, folder=folder, folds=folds, splits=_read_splits(dataset), file_ending=file_ending, is_unseen=is_unseen
    )
    predictions = {case: plan.file for case, plan in planned.items() if plan.file is not None}
    if len(predictions) < len(planned):
        device = resolve_device(device_name)
        set_torch_threads(device.type)
        predictions = predict_missing(
            planned,
            {case: entry["images"] for case, entry in cases.items()},
            folder=folder,
            checkpoint=checkpoint,
            output=output,
            file_ending=file_ending,
            device=device,
            num_processes=num_processes,
        )
    return {
        case: CaseFiles(entry["label"], str(predictions[case]), entry["images"], planned[case].is_seen)
        for case, entry in cases.items()
    }


def _rank_cases(
    files: Mapping[str, CaseFiles],
    dataset: str,
    dataset_json: Mapping[str, Any],
    model: Path,
    reader: BaseReaderWriter,
    *,
    false_alarms: float,
    num_processes: int,
) -> Audit:
    """Compare the label of every case with its prediction, and rank the cases by doubt."""
    from nnunetv2.annotation_audit.audit import compare_files, name_classes, rank
    from nnunetv2.plans.label_manager import LabelManager
    from nnunetv2.utilities.map_cases import map_cases

    labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    classes = name_classes(labels)
    compared = map_cases(
        compare_files,
        {case: (one.label, one.prediction, reader, classes, labels.ignore_label) for case, one in files.items()},
        num_processes,
        [file for one in files.values() for file in (one.label, one.prediction)],
    )
    return rank(compared, files, dataset=dataset, model=str(model), classes=classes, false_alarms=false_alarms)


def _show_result(audit: Audit, target: Path) -> None:
    """Print the most doubtful cases, those that could not be compared, and where the report lies."""
    from nnunetv2.annotation_audit.report import HTML_FILE

    show(f"{len(audit.doubtful)} of {len(audit.cases)} cases are doubtful (score above {audit.cut:.2f})")
    for case in audit.doubtful[:_SHOWN]:
        show(f"  {case.score:6.1f}  {case.case}: {case.reason}")
    if len(audit.doubtful) > _SHOWN:
        show(f"  and {len(audit.doubtful) - _SHOWN} more")
    for name, reason in audit.failed.items():
        show(f"  not compared: {name}: {reason}")
    show(f"Pictures and tables: {target / HTML_FILE}")


def _labelled_cases(raw: Path, dataset_json: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files of all labelled cases but those left out as bad ones.

    Raises:
        InvalidInputError: There is none, or one has no image.
    """
    from nnunetv2.errors import InvalidInputError
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.preprocessed_data.bad_cases import list_training_cases
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    if nnUNet_preprocessed.is_set():
        cases = list_training_cases(raw, Path(nnUNet_preprocessed) / raw.name, dataset_json)
    else:
        cases = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    if not cases:
        raise InvalidInputError(f"{raw} has no labelled cases")
    without = [case for case, entry in cases.items() if not entry["images"]]
    if without:
        raise InvalidInputError(f"{raw / 'dataset.json'}: case {without[0]} has no image: list one per channel")
    return cases


def _read_splits(dataset: str) -> list[Mapping[str, Sequence[str]]]:
    """Return the splits of a dataset; none if it has not been preprocessed here."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.training.splits import SPLITS_FILE
    from nnunetv2.utilities.crossval_split import read_splits

    if not nnUNet_preprocessed.is_set():
        return []
    path = Path(nnUNet_preprocessed, dataset, SPLITS_FILE)
    return list(read_splits(path)) if path.is_file() else []


def _require_same_task(of_model: Mapping[str, Any], of_dataset: Mapping[str, Any], folder: Path, raw: Path) -> None:
    """Refuse a model that segments something else.

    Raises:
        InvalidInputError: Labels, regions or the number of channels differ.
    """
    from nnunetv2.errors import InvalidInputError

    def channels(description: Mapping[str, Any]) -> int:
        return len(description.get("channel_names", description.get("modality", ())))

    for key in ("labels", "regions_class_order"):
        if of_model.get(key) != of_dataset.get(key):
            raise InvalidInputError(
                f"the model in {folder} was trained for other {key} ({of_model.get(key)}) than those of {raw} "
                f"({of_dataset.get(key)}): audit with a model of the same task"
            )
    if channels(of_model) != channels(of_dataset):
        raise InvalidInputError(
            f"the model in {folder} takes {channels(of_model)} channels, {raw} has {channels(of_dataset)}"
        )
