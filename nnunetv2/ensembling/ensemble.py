"""Average the probabilities that several models predicted, and turn the mean into label maps."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.ensembling.probability_files import average_classes
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.map_cases import map_cases
from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.plans.label_manager import LabelManager


def average_probabilities(list_of_files: Sequence[str]) -> np.ndarray:
    """Return the mean of the arrays `probabilities` in some `.npz` files, float32 `(c, *spatial)`."""
    shape, classes = average_classes(list_of_files)
    mean = np.empty(shape, dtype=np.float32)
    for target, channel in zip(mean, classes):
        target[...] = channel
    return mean


def merge_files(
    list_of_files: Sequence[str],
    output_filename_truncated: str,
    output_file_ending: str,
    image_reader_writer: BaseReaderWriter | type[BaseReaderWriter],
    label_manager: LabelManager,
    save_probabilities: bool = False,
) -> None:
    """Write the label map of a case from the mean of its probabilities.

    Unless probabilities are saved, or the label manager has rules of its own, memory holds two classes per model and
    never the whole volume of all classes.

    Args:
        list_of_files: The case's `.npz` file of each model. The first one's `.pkl` sibling has the geometry.
        output_filename_truncated: Path without ending.
        image_reader_writer: Writes the label map.
        save_probabilities: Also write the mean as `.npz` and the geometry as `.pkl`.
    """
    from nnunetv2.inference.export_prediction import save_probabilities_file, write_segmentation

    writer = image_reader_writer() if isinstance(image_reader_writer, type) else image_reader_writer
    properties = load_pickle_safely(Path(list_of_files[0]).with_suffix(".pkl"))
    if save_probabilities or not _decides_by_class(label_manager):
        mean = average_probabilities(list_of_files)
        segmentation = label_manager.convert_probabilities_to_segmentation(mean)
    else:
        segmentation = _decide(list_of_files, label_manager)
    if save_probabilities:
        save_probabilities_file(mean, f"{output_filename_truncated}.npz")
        save_pickle(properties, f"{output_filename_truncated}.pkl")
    labels = _labels_path(list_of_files[0], os.fspath(output_filename_truncated), output_file_ending)
    write_segmentation(writer, segmentation, labels, properties)


def _labels_path(probabilities: str | os.PathLike[str], output: str, ending: str) -> str:
    """Return where a case's label map goes: `a.nii.gz` for `a.nii.gz.npz` that lies beside a label map `a.nii.gz`.

    So it is where a program has named its output with the ending; see `inference.case_lists.name_outputs`.
    """
    case = Path(probabilities).with_suffix("")
    has_ending = case.name.endswith(ending) and case.is_file() and not Path(f"{case}{ending}").is_file()
    return output if has_ending else f"{output}{ending}"


def _decides_by_class(label_manager: LabelManager) -> bool:
    """Tell whether labels follow from probabilities by the rules of LabelManager, which look at one class at a time."""
    from nnunetv2.plans.label_manager import LabelManager

    rule = "convert_probabilities_to_segmentation"
    return getattr(type(label_manager), rule) is getattr(LabelManager, rule)


def _decide(files: Sequence[str], label_manager: LabelManager) -> np.ndarray:
    """Return the result of `convert_probabilities_to_segmentation` for the mean, class by class."""
    shape, classes = average_classes(files)
    if shape[0] != label_manager.num_segmentation_heads:
        raise ValueError(
            f"{files[0]} has {shape[0]} classes, but the labels ask for "
            f"{label_manager.num_segmentation_heads}: it belongs to another dataset"
        )
    labels = np.zeros(shape[1:], dtype=np.uint16)
    if label_manager.has_regions:
        for channel, label in zip(classes, label_manager.regions_class_order):
            np.copyto(labels, label, where=channel > 0.5)
    else:
        _write_most_probable(classes, labels)
    return labels


def _write_most_probable(classes: Iterator[np.ndarray], labels: np.ndarray) -> None:
    best = next(classes)
    for label, channel in enumerate(classes, start=1):
        np.copyto(labels, label, where=channel > best)  # the first of equals stays
        np.maximum(best, channel, out=best)


def ensemble_folders(
    list_of_input_folders: Sequence[str],
    output_folder: str,
    save_merged_probabilities: bool = False,
    num_processes: int = default_num_processes,
    dataset_json_file_or_dict: str | Mapping[str, Any] | None = None,
    plans_json_file_or_dict: str | Mapping[str, Any] | None = None,
) -> None:
    """Ensemble the predictions of several models for the same images.

    There will be one label map per case, and dataset.json and plans.json so that the folder can be postprocessed.

    Args:
        list_of_input_folders: Folders with `.npz` and `.pkl` files (`nnUNetv2_predict --save_probabilities`).
        output_folder: Created if needed.
        save_merged_probabilities: Also write mean probabilities.
        dataset_json_file_or_dict: Default: the first folder's dataset.json. Likewise the plans.

    Raises:
        AssertionError: The folders hold different cases.
        FileNotFoundError: There is no case, or dataset.json or plans.json is missing.
    """
    dataset_json = _read_json(list_of_input_folders[0], "dataset.json", dataset_json_file_or_dict)
    plans = _read_json(list_of_input_folders[0], "plans.json", plans_json_file_or_dict)
    names = _common_names(list_of_input_folders)
    cases = {Path(name).stem: [os.path.join(folder, name) for folder in list_of_input_folders] for name in names}
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    _merge_cases(cases, output_folder, dataset_json, plans, num_processes, save_merged_probabilities)
    save_json_atomically(dataset_json, Path(output_folder, "dataset.json"), sort_keys=False)
    save_json_atomically(plans, Path(output_folder, "plans.json"), sort_keys=False)


def ensemble_crossvalidations(
    list_of_trained_model_folders: Sequence[str],
    output_folder: str,
    folds: Sequence[int | str] = (0, 1, 2, 3, 4),
    num_processes: int = default_num_processes,
    overwrite: bool = True,
) -> None:
    """Ensemble the validation predictions of several models, whose splits may differ.

    There will be one label map per case, plans.json and dataset.json of the first model.

    Args:
        folds: Of which each model needs validation predictions with probabilities.
        overwrite: If False, cases that have a label map already are left as they are.

    Raises:
        RuntimeError: A fold lacks its validation predictions or their probabilities, or a model lacks a case.
        AssertionError: A case was predicted in several folds.
    """
    dataset_json, plans = (
        _read_json(list_of_trained_model_folders[0], name, None) for name in ("dataset.json", "plans.json")
    )
    by_model = [_validation_files(folder, folds) for folder in list_of_trained_model_folders]
    names = sorted(set().union(*by_model))
    for folder, files in zip(list_of_trained_model_folders, by_model):
        missing = [name for name in names if name not in files]
        if missing:
            raise RuntimeError(
                f"{folder}: {len(missing)} cases of the other models have no probabilities in folds "
                f"{', '.join(map(str, folds))}: {', '.join(missing[:5])}"
            )
    cases = {Path(name).stem: [files[name] for files in by_model] for name in names}
    if not overwrite:
        cases = {
            case: files
            for case, files in cases.items()
            if not Path(output_folder, f"{case}{dataset_json['file_ending']}").is_file()
        }
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    _merge_cases(cases, output_folder, dataset_json, plans, num_processes)
    save_json_atomically(dataset_json, Path(output_folder, "dataset.json"), sort_keys=False)
    save_json_atomically(plans, Path(output_folder, "plans.json"), sort_keys=False)


def entry_point_ensemble_folders() -> None:
    """Run `nnUNetv2_ensemble`."""

    def ensemble() -> None:
        args = build_parser().parse_args()
        ensemble_folders(args.i, args.o, args.save_npz, args.np)

    run_command(ensemble)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_ensemble`."""
    parser = argparse.ArgumentParser(description="Average the probabilities that several models predicted.")
    parser.add_argument(
        "-i",
        nargs="+",
        required=True,
        help="Folders of predictions of the same images, made with --save_probabilities.",
    )
    parser.add_argument("-o", required=True, help="Folder for the label maps; created if needed.")
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        help=f"Cases worked on at the same time. Default: {default_num_processes}",
    )
    parser.add_argument(
        "--save_npz",
        action="store_true",
        help="Also write the mean probabilities (.npz and .pkl), to be ensembled further.",
    )
    return parser


def _merge_cases(
    cases: Mapping[str, list[str]],
    output_folder: str,
    dataset_json: Mapping[str, Any],
    plans: Mapping[str, Any],
    num_processes: int,
    save_probabilities: bool = False,
) -> None:
    from nnunetv2.plans.plans_manager import PlansManager

    manager = PlansManager(dict(plans))
    merge = partial(
        merge_files,
        output_file_ending=dataset_json["file_ending"],
        image_reader_writer=manager.image_reader_writer_class(),
        label_manager=manager.get_label_manager(dataset_json),
        save_probabilities=save_probabilities,
    )
    arguments = {case: (files, os.path.join(output_folder, case)) for case, files in cases.items()}
    map_cases(merge, arguments, num_processes, [file for files in cases.values() for file in files])


def _common_names(folders: Sequence[str]) -> list[str]:
    names = [sorted(file.name for file in Path(folder).glob("*.npz")) for folder in folders]
    for folder, found in zip(folders, names):
        difference = sorted(set(found) ^ set(names[0]))
        assert not difference, (
            f"{folder} and {folders[0]} must have the same .npz files; in one of them only: {', '.join(difference[:5])}"
        )
    if not names[0]:
        raise FileNotFoundError(f"there is no .npz file in {folders[0]}; predict with --save_probabilities")
    return names[0]


def _validation_files(model_folder: str, folds: Sequence[int | str]) -> dict[str, str]:
    """Return the probability files of a model's validation cases by name."""
    files: dict[str, str] = {}
    for fold in folds:
        folder = Path(model_folder, f"fold_{fold}", "validation")
        found = sorted(folder.glob("*.npz")) if folder.is_dir() else []
        if not found:
            what = "no .npz files in" if folder.is_dir() else "no folder"
            raise RuntimeError(
                f"{model_folder}, fold {fold}: there is {what} {folder}. Run the validation again and "
                f"save probabilities: nnUNetv2_train ... {fold} --val --npz"
            )
        for file in found:
            assert file.name not in files, (
                f"{file.stem} was predicted in two folds of {model_folder}: {files[file.name]} and {file}"
            )
            files[file.name] = str(file)
    return files


def _read_json(folder: str, name: str, given: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    path = Path(folder, name) if given is None else Path(given)
    return read_json(
        path, if_missing=f"there is no {path}: it says which labels were predicted, and how files are written"
    )
