"""Remove voxels outside the largest component of a class.

Find out where that helps, and apply it to folders.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.postprocessing.components import (
    remove_all_but_largest_component_from_segmentation as remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.file_endings import list_names
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.map_cases import map_cases
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)

PostprocessingFunction = Callable[..., np.ndarray]


def apply_postprocessing(
    segmentation: np.ndarray, pp_fns: Sequence[PostprocessingFunction], pp_fn_kwargs: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Apply functions one after the other, each with its own keywords."""
    for function, kwargs in zip(pp_fns, pp_fn_kwargs):
        segmentation = function(segmentation, **kwargs)
    return segmentation


def load_postprocess_save(
    segmentation_file: str,
    output_fname: str,
    image_reader_writer: BaseReaderWriter,
    pp_fns: Sequence[PostprocessingFunction],
    pp_fn_kwargs: Sequence[Mapping[str, Any]],
) -> None:
    """Read a label map, postprocess it, and write it with the geometry it had."""
    from nnunetv2.inference.export_prediction import write_segmentation

    segmentation, properties = image_reader_writer.read_seg(segmentation_file)
    result = apply_postprocessing(segmentation[0], pp_fns, pp_fn_kwargs)
    write_segmentation(image_reader_writer, result, output_fname, properties)


def determine_postprocessing(
    folder_predictions: str,
    folder_ref: str,
    plans_file_or_dict: str | dict | None,
    dataset_json_file_or_dict: str | dict | None,
    num_processes: int = default_num_processes,
    keep_postprocessed_files: bool = True,
) -> tuple[list[PostprocessingFunction], list[dict[str, Any]]]:
    """Find out for which classes keeping the largest component only raises the mean Dice.

    First all foreground is taken as one mask, which must raise the foreground mean and lower no class; then each class
    by itself, which must raise its own mean. Writes `postprocessing.pkl` and `postprocessing.json` into the folder of
    predictions, `summary.json` if it is missing, and the postprocessed label maps with their summary into
    `postprocessed/`.

    Args:
        folder_predictions: Label maps predicted in cross-validation.
        folder_ref: Their references, with the same names.
        plans_file_or_dict: Plans; None takes plans.json from the predictions. Likewise dataset.json.
        keep_postprocessed_files: If False, `postprocessed/` is not written.

    Returns:
        The functions and their keywords, in the order in which they apply; both empty if nothing helps.

    Raises:
        RuntimeError: plans.json or dataset.json is neither given nor in the folder.
        FileNotFoundError: There are no predictions, or one has no reference.
    """
    from nnunetv2.postprocessing.decision import decide
    from nnunetv2.postprocessing.decision_files import save_decision

    dataset = _DatasetFiles.read(folder_predictions, plans_file_or_dict, dataset_json_file_or_dict)
    decision = decide(
        folder_predictions,
        folder_ref,
        dataset.reader,
        dataset.ending,
        dataset.label_manager,
        num_processes,
        hidden=dataset.hidden,
    )
    functions = [remove_all_but_largest_component_from_segmentation] * len(decision.accepted)
    kwargs = [{"labels_or_regions": entry} for entry in decision.accepted]
    save_decision(folder_predictions, decision, functions, kwargs)
    if keep_postprocessed_files:
        _write_postprocessed(folder_predictions, decision, dataset, functions, kwargs, num_processes)
    else:
        shutil.rmtree(Path(folder_predictions, "postprocessed"), ignore_errors=True)
    return functions, kwargs


def apply_postprocessing_to_folder(
    input_folder: str,
    output_folder: str,
    pp_fns: Sequence[PostprocessingFunction],
    pp_fn_kwargs: Sequence[Mapping[str, Any]],
    plans_file_or_dict: str | dict | None = None,
    dataset_json_file_or_dict: str | dict | None = None,
    num_processes: int = 8,
) -> None:
    """Postprocess all label maps of a folder into another one, which is created.

    Args:
        plans_file_or_dict: Plans; None takes plans.json from the input folder. Likewise dataset.json.

    Raises:
        RuntimeError: plans.json or dataset.json is neither given nor in the folder.
    """
    dataset = _DatasetFiles.read(input_folder, plans_file_or_dict, dataset_json_file_or_dict)
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    names = list_names(input_folder, dataset.ending)
    if not names:
        raise FileNotFoundError(f"nothing to postprocess in {input_folder}: no file ends in {dataset.ending}")
    _postprocess_files(names, input_folder, output_folder, dataset.reader, pp_fns, pp_fn_kwargs, num_processes)


def entry_point_determine_postprocessing_folder() -> None:
    """Run `nnUNetv2_determine_postprocessing`."""

    def determine() -> None:
        args = build_determine_parser().parse_args()
        _, kwargs = determine_postprocessing(
            args.i,
            args.ref,
            args.plans_json,
            args.dataset_json,
            args.np,
            keep_postprocessed_files=not args.remove_postprocessed,
        )
        kept = "; ".join(str(entry["labels_or_regions"]) for entry in kwargs) or "nothing"
        show(f"largest component only for: {kept}. Details in {Path(args.i, 'postprocessing.json')}")

    run_command(determine)


def entry_point_apply_postprocessing() -> None:
    """Run `nnUNetv2_apply_postprocessing`."""

    def apply() -> None:
        from nnunetv2.postprocessing.decision_files import load_functions

        args = build_apply_parser().parse_args()
        functions, kwargs = load_functions(args.pp_pkl_file)
        apply_postprocessing_to_folder(args.i, args.o, functions, kwargs, args.plans_json, args.dataset_json, args.np)

    run_command(apply)


def build_determine_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_determine_postprocessing`."""
    parser = argparse.ArgumentParser(
        description="Find out for which classes it helps to keep the largest component only."
    )
    parser.add_argument(
        "-i",
        required=True,
        help="Folder of cross-validation predictions; gets postprocessing.pkl and postprocessing.json.",
    )
    parser.add_argument("-ref", required=True, help="Folder of reference label maps with the same names.")
    _add_json_options(parser)
    parser.add_argument(
        "--remove_postprocessed",
        action="store_true",
        help="Do not keep the postprocessed label maps (folder postprocessed).",
    )
    return parser


def build_apply_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_apply_postprocessing`."""
    parser = argparse.ArgumentParser(description="Apply a postprocessing that was determined before.")
    parser.add_argument("-i", required=True, help="Folder of predictions.")
    parser.add_argument("-o", required=True, help="Folder for the postprocessed label maps.")
    parser.add_argument(
        "-pp_pkl_file",
        required=True,
        help="postprocessing.pkl; if there is a postprocessing.json beside it, that one is read.",
    )
    _add_json_options(parser)
    return parser


def _add_json_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-plans_json", default=None, help="plans.json. Default: the one in the folder given by -i")
    parser.add_argument("-dataset_json", default=None, help="dataset.json. Default: the one in the folder given by -i")
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        help=f"Cases worked on at the same time. Default: {default_num_processes}",
    )


class _DatasetFiles:
    """The description of label maps by plans and dataset.json."""

    def __init__(self, plans: dict, dataset_json: dict) -> None:
        from nnunetv2.plans.partial_labels import unannotated_labels
        from nnunetv2.plans.plans_manager import PlansManager

        manager = PlansManager(plans)
        self.ending: str = dataset_json["file_ending"]
        self.reader: BaseReaderWriter = manager.image_reader_writer_class()
        self.label_manager = manager.get_label_manager(dataset_json)
        self.hidden = unannotated_labels(dataset_json)

    @classmethod
    def read(cls, folder: str, plans: str | dict | None, dataset_json: str | dict | None) -> _DatasetFiles:
        return cls(
            _read_json(folder, "plans.json", plans, "-plans_json"),
            _read_json(folder, "dataset.json", dataset_json, "-dataset_json"),
        )


def _read_json(folder: str, name: str, given: str | os.PathLike[str] | dict | None, option: str) -> dict:
    if isinstance(given, dict):
        return given
    path = Path(folder, name) if given is None else Path(given)
    if given is None and not path.is_file():
        raise RuntimeError(f"{folder} has no {name}: name the one of the model that made these predictions ({option})")
    return read_json(path)


def _postprocess_files(
    names: Sequence[str],
    source: str,
    target: str,
    reader: BaseReaderWriter,
    functions: Sequence[PostprocessingFunction],
    kwargs: Sequence[Mapping[str, Any]],
    num_processes: int,
) -> None:
    work = partial(load_postprocess_save, image_reader_writer=reader, pp_fns=functions, pp_fn_kwargs=kwargs)
    files = {name: (os.path.join(source, name), os.path.join(target, name)) for name in names}
    map_cases(work, files, num_processes, [paths[0] for paths in files.values()])


def _write_postprocessed(
    folder: str,
    decision: Any,
    dataset: _DatasetFiles,
    functions: Sequence[PostprocessingFunction],
    kwargs: Sequence[Mapping[str, Any]],
    num_processes: int,
) -> None:
    """Write postprocessed label maps, their summary, and the two JSON files that a prediction folder has."""
    from nnunetv2.evaluation.evaluate_predictions import save_summary_json

    target = Path(folder, "postprocessed")
    shutil.rmtree(target, ignore_errors=True)  # files of an earlier decision
    target.mkdir()
    # A label map that nothing is removed from is copied: compressing it anew would take most of the time.
    unchanged = [name for name in decision.names if name not in decision.changed]
    for name in unchanged:
        shutil.copyfile(Path(folder, name), target / name)
    _postprocess_files(sorted(decision.changed), folder, str(target), dataset.reader, functions, kwargs, num_processes)
    for name in ("dataset.json", "plans.json"):
        if Path(folder, name).is_file():
            shutil.copyfile(Path(folder, name), target / name)
    save_summary_json(decision.summary_after(str(target)), target / "summary.json")
