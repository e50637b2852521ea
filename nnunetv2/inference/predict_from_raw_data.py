"""Predict cases from raw images.

Here are the two commands, and every name that scripts import from this module.

The predictor itself lives in `predictor.py`, which needs torch. Its names are looked up here when first asked for, so
that `nnUNetv2_predict -h` answers at once. Programs replace names of this module (for instance `nnUNetPredictor` or
`recursive_find_trainer_class_by_name`); the commands and the predictor therefore reach them through it, at each call.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.interruption import run_until_interrupted
from nnunetv2.utilities.command_line import add_device_option, run_command
from nnunetv2.utilities.legacy_names import names_from, origins

if TYPE_CHECKING:
    from nnunetv2.inference.predictor import nnUNetPredictor

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

CITATION = (
    "If you publish results, please cite: Isensee, Jaeger, Kohl, Petersen, Maier-Hein. nnU-Net: a "
    "self-configuring method for deep learning-based biomedical image segmentation. Nature Methods 18, 203-211 "
    "(2021)."
)

# Names that are looked up here. The second half is for programs that replace methods of the predictor by their own, and
# find the tools for it in this module.
_ORIGINS = origins(
    {
        "nnunetv2.inference.predictor": "nnUNetPredictor",
        "nnunetv2.inference.sliding_window_prediction": "compute_gaussian compute_steps_for_sliding_window",
        "nnunetv2.inference.export_prediction": "convert_predicted_logits_to_segmentation_with_correct_shape export_prediction_from_logits",
        "nnunetv2.inference.data_iterators": "preprocessing_iterator_fromfiles preprocessing_iterator_fromnpy PreprocessAdapterFromNpy",
        "nnunetv2.utilities.find_objects": "recursive_find_trainer_class_by_name",
        "nnunetv2.utilities.find_class_by_name": "recursive_find_python_class",
        "nnunetv2.utilities.plans_handling.plans_handler": "PlansManager ConfigurationManager",
        "nnunetv2.utilities.label_handling.label_handling": "determine_num_input_channels convert_labelmap_to_one_hot",
        "nnunetv2.utilities.utils": "create_lists_from_splitted_dataset_folder",
        "nnunetv2.utilities.file_path_utilities": "get_output_folder check_workers_alive_and_busy",
        "nnunetv2.utilities.json_export": "recursive_fix_for_json_export",
        "nnunetv2.utilities.helpers": "empty_cache dummy_context",
        "acvl_utils.cropping_and_padding.padding": "pad_nd_image",
        "batchgenerators.dataloading.multi_threaded_augmenter": "MultiThreadedAugmenter",
        "batchgenerators.utilities.file_and_folder_operations": "load_json save_json join isfile isdir subdirs maybe_mkdir_p",
        "torch._dynamo": "OptimizedModule",
        "torch.nn.parallel": "DistributedDataParallel",
        "copy": "deepcopy",
        "queue": "Queue",
        "threading": "Thread",
        "time": "sleep",
        "tqdm": "tqdm",
        "typing": "List Optional Tuple Union",
    },
    inspect="inspect",
    itertools="itertools",
    multiprocessing="multiprocessing",
    nn="torch.nn",
    np="numpy",
    os="os",
    torch="torch",
    warnings="warnings",
)

__all__ = ["default_num_processes", "predict_entry_point", "predict_entry_point_modelfolder", *_ORIGINS]
__getattr__ = names_from(_ORIGINS, __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ORIGINS})


def predict_entry_point() -> None:
    """Run `nnUNetv2_predict`."""
    run_command(lambda: run_until_interrupted(lambda: _predict(build_parser().parse_args())))


def predict_entry_point_modelfolder() -> None:
    """Run `nnUNetv2_predict_from_modelfolder`."""
    run_command(
        lambda: run_until_interrupted(lambda: _predict_from_model_folder(build_model_folder_parser().parse_args()))
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_predict`."""
    parser = argparse.ArgumentParser(
        description="Segment the images of a folder with a model from nnUNet_results.", epilog=CITATION
    )
    _add_folders(parser)
    parser.add_argument("-d", required=True, help="Dataset the model was trained on: its name or id.")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans identifier. Default: nnUNetPlans")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer class name. Default: nnUNetTrainer")
    parser.add_argument("-c", required=True, help="Configuration, for example 2d or 3d_fullres.")
    _add_prediction_options(
        parser, npp=_getDefaultValue("nnUNet_npp", int, 3), nps=_getDefaultValue("nnUNet_nps", int, 3)
    )
    parser.add_argument(
        "--continue_prediction",
        action="store_true",
        help="Keep the predictions that are there already and make the missing ones.",
    )
    parser.add_argument(
        "-num_parts",
        type=int,
        default=1,
        help="Share the cases among this many calls (for example one per GPU). Default: 1",
    )
    parser.add_argument(
        "-part_id",
        type=int,
        default=0,
        help="Which of the -num_parts calls this one is: 0 to num_parts - 1. Default: 0",
    )
    return parser


def build_model_folder_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_predict_from_modelfolder`."""
    parser = argparse.ArgumentParser(
        description="Segment the images of a folder with a model from any folder; nnUNet_results need not be set.",
        epilog=CITATION,
    )
    _add_folders(parser)
    parser.add_argument("-m", required=True, help="Model folder: it holds plans.json, dataset.json and fold_X.")
    _add_prediction_options(parser, npp=3, nps=3)
    parser.add_argument(
        "--continue_prediction",
        "--c",
        action="store_true",
        help="Keep the predictions that are there already and make the missing ones.",
    )
    return parser


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", required=True, help="Folder of input images, named as for training: CASE_0000, ..., one file per channel."
    )
    parser.add_argument("-o", required=True, help="Folder for the predictions; created if it does not exist.")


def _add_prediction_options(parser: argparse.ArgumentParser, *, npp: int, nps: int) -> None:
    parser.add_argument(
        "-f",
        nargs="+",
        default=["0", "1", "2", "3", "4"],
        help="Folds whose networks are averaged: numbers or all. Default: 0 1 2 3 4",
    )
    parser.add_argument(
        "-step_size",
        type=float,
        default=0.5,
        help="Distance of neighbouring tiles as a fraction of the patch size, at most 1. Default: 0.5",
    )
    parser.add_argument(
        "--disable_tta",
        action="store_true",
        help="Do not average over mirrored copies: up to 8 times as fast, a little less accurate.",
    )
    parser.add_argument("--verbose", action="store_true", help="Say more about each case.")
    parser.add_argument(
        "--save_probabilities",
        action="store_true",
        help="Also write class probabilities (.npz) and image properties (.pkl), for ensembling.",
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", help="File name of the checkpoint. Default: checkpoint_final.pth"
    )
    parser.add_argument(
        "-npp",
        type=int,
        default=npp,
        help=f"Workers for preprocessing; 0 preprocesses between predictions. Default: {npp}",
    )
    parser.add_argument(
        "-nps", type=int, default=nps, help=f"Workers for export; 0 exports between predictions. Default: {nps}"
    )
    parser.add_argument(
        "-prev_stage_predictions",
        default=None,
        help="Folder with the predictions of a cascade's previous stage. Default: predict that first, "
        "with the model beside this one.",
    )
    add_device_option(parser)
    parser.add_argument("--disable_progress_bar", action="store_true", help="Show no progress bar.")
    parser.add_argument(
        "--not_on_device",
        action="store_true",
        help="Collect results in main memory instead of on the GPU: slower, for large images on small GPUs.",
    )


def _predict(args: argparse.Namespace) -> None:
    from nnunetv2.inference import predict_from_raw_data as public

    if not 0 <= args.part_id < args.num_parts:
        raise ValueError(f"-part_id must be 0 to -num_parts - 1, got part {args.part_id} of {args.num_parts}")
    model_folder = public.get_output_folder(args.d, args.tr, args.p, args.c)
    _predict_folder(args, model_folder, part_id=args.part_id, num_parts=args.num_parts)


def _predict_from_model_folder(args: argparse.Namespace) -> None:
    _predict_folder(args, args.m, part_id=0, num_parts=1)


def _predict_folder(args: argparse.Namespace, model_folder: str, *, part_id: int, num_parts: int) -> None:
    logger.info(CITATION)
    Path(args.o).mkdir(parents=True, exist_ok=True)
    folds = _parse_folds(args.f)
    predictor = _build_predictor(args)
    predictor.initialize_from_trained_model_folder(model_folder, folds, args.chk)
    previous_stage = predictor.configuration_manager.previous_stage_name
    if previous_stage is None or args.prev_stage_predictions is not None:
        _predict_cases(args, predictor, part_id=part_id, num_parts=num_parts)
    else:
        _predict_both_stages(args, predictor, model_folder, previous_stage, folds, part_id=part_id, num_parts=num_parts)


def _predict_cases(args: argparse.Namespace, predictor: nnUNetPredictor, *, part_id: int, num_parts: int) -> None:
    common = {
        "save_probabilities": args.save_probabilities,
        "overwrite": not args.continue_prediction,
        "folder_with_segs_from_prev_stage": args.prev_stage_predictions,
    }
    if args.npp == args.nps == 0 and num_parts == 1:
        predictor.predict_from_files_sequential(args.i, args.o, **common)
        return
    predictor.predict_from_files(
        args.i,
        args.o,
        **common,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
        num_parts=num_parts,
        part_id=part_id,
    )


def _predict_both_stages(
    args: argparse.Namespace,
    predictor: nnUNetPredictor,
    model_folder: str,
    previous_stage: str,
    folds: list[int | str],
    *,
    part_id: int,
    num_parts: int,
) -> None:
    """Predict the previous stage of a cascade with the model beside it, then go on from there."""
    from nnunetv2.inference.previous_stage import previous_stage_model, previous_stage_output, run_both_stages

    model = previous_stage_model(Path(model_folder), previous_stage, folds, args.chk)
    output = str(previous_stage_output(Path(args.o), previous_stage))
    logger.info("a cascade without -prev_stage_predictions: predicting %s into %s first", previous_stage, output)
    first = argparse.Namespace(**{**vars(args), "o": output, "save_probabilities": False})
    second = argparse.Namespace(**{**vars(args), "prev_stage_predictions": output})
    run_both_stages(
        lambda: _predict_folder(first, str(model), part_id=part_id, num_parts=num_parts),
        lambda: _predict_cases(second, predictor, part_id=part_id, num_parts=num_parts),
        name_of_first=previous_stage,
        file_ending=predictor.dataset_json["file_ending"],
    )


def _build_predictor(args: argparse.Namespace) -> nnUNetPredictor:
    from nnunetv2.inference import predict_from_raw_data as public
    from nnunetv2.utilities.device import resolve_device, set_torch_threads

    device = resolve_device(args.device)
    set_torch_threads(device.type)
    return public.nnUNetPredictor(
        tile_step_size=args.step_size,
        use_gaussian=True,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        device=device,
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
    )


def _parse_folds(folds: list[str]) -> list[int | str]:
    """Turn the values of -f into fold numbers; `all` stays."""
    wrong = [fold for fold in folds if fold != "all" and not fold.isdecimal()]
    if wrong:
        raise ValueError(f"-f takes fold numbers or all, got {' '.join(wrong)}")
    return [fold if fold == "all" else int(fold) for fold in folds]


def _getDefaultValue(env: str, dtype: Callable[[str], Value], default: Value) -> Value:
    """Return the value of an environment variable, or `default` if it is unset, empty or not convertible."""
    text = os.environ.get(env, "")
    try:
        return dtype(text) if text else default
    except ValueError:
        return default
