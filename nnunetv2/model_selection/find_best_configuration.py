"""Compare models and pairs of them by cross-validation.

And say how to predict with the best.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.model_selection.inference_instructions import generate_inference_command, print_inference_instructions
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import default_merged_folder, get_ensemble_name, get_output_folder
from nnunetv2.utilities.json_files import PLANS, read_json
from nnunetv2.utilities.plain_text import show

__all__ = [
    "default_trained_models",
    "filter_available_models",
    "generate_inference_command",
    "find_best_configuration",
    "print_inference_instructions",
    "dumb_trainer_config_plans_to_trained_models_dict",
    "find_best_configuration_entry_point",
    "accumulate_crossval_results_entry_point",
]

logger = logging.getLogger(__name__)

Model = dict[str, str]

STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")

default_trained_models: tuple[Model, ...] = tuple(
    {"plans": "nnUNetPlans", "configuration": name, "trainer": "nnUNetTrainer"} for name in STANDARD_CONFIGURATIONS
)
"""The standard configurations with the default plans and trainer."""


def dumb_trainer_config_plans_to_trained_models_dict(
    trainers: Sequence[str], configs: Sequence[str], plans: Sequence[str]
) -> tuple[Model, ...]:
    """Return all combinations, those of the first trainer first and of the plans last."""
    return tuple(
        {"plans": plan, "configuration": configuration, "trainer": trainer}
        for trainer, configuration, plan in product(trainers, configs, plans)
    )


def filter_available_models(model_dict: Sequence[Model], dataset_name_or_id: int | str) -> list[Model]:
    """Return the models whose configuration is in its plans; a note names the others.

    Raises:
        RuntimeError: A model's configuration is in the plans, but it was not trained.
        FileNotFoundError: The dataset has no such plans.
    """
    dataset = maybe_convert_to_dataset_name(dataset_name_or_id)
    available = []
    for model in model_dict:
        plans_file = Path(nnUNet_preprocessed, dataset, f"{model['plans']}.json")
        if not plans_file.is_file():
            raise FileNotFoundError(f"there is no {plans_file}; run nnUNetv2_plan_experiment, or name other plans (-p)")
        if model["configuration"] not in read_json(plans_file, required=PLANS)["configurations"]:
            logger.info(
                "configuration %s is not in plans %s of %s: left out", model["configuration"], model["plans"], dataset
            )
            continue
        folder = _folder(dataset, model)
        if not Path(folder).is_dir():
            raise RuntimeError(
                f"{model['configuration']} has not been trained with {model['trainer']} and "
                f"{model['plans']}: {folder} does not exist. Train it, or name the configurations to "
                "compare (-c)"
            )
        available.append(model)
    return available


def find_best_configuration(
    dataset_name_or_id: int | str,
    allowed_trained_models: Sequence[Model] = default_trained_models,
    allow_ensembling: bool = True,
    num_processes: int = default_num_processes,
    overwrite: bool = True,
    folds: Sequence[int | str] = (0, 1, 2, 3, 4),
    strict: bool = False,
) -> dict[str, Any]:
    """Find the model, or pair of models, with the highest mean foreground Dice in cross-validation.

    Determines its postprocessing, writes inference_information.json and inference_instructions.txt into the results of
    the dataset, and prints the latter.

    Args:
        allowed_trained_models: Candidates: dicts with `plans`, `configuration`, `trainer`.
        allow_ensembling: Consider pairs, too; needs the probabilities of all validation cases.
        overwrite: If False, the accumulated and ensembled results of earlier calls are used again.
        folds: Those that were trained.
        strict: Not needed; kept because callers pass it. Candidates whose configuration the plans do not have are left
            out; all others must exist.

    Returns:
        The content of inference_information.json.

    Raises:
        RuntimeError: A candidate was not trained or validated, or none is left.
    """
    dataset = maybe_convert_to_dataset_name(dataset_name_or_id)
    models = filter_available_models(allowed_trained_models, dataset)
    if not models:
        raise RuntimeError(f"none of the configurations is in the plans of {dataset}; name others (-c, -p)")
    candidates = _score_models(dataset, models, folds, num_processes, overwrite)
    if allow_ensembling:
        candidates |= _score_pairs(dataset, models, folds, num_processes, overwrite)
    # the first of equals; NaN, where no class was ever seen, loses against any number
    best = max(candidates.values(), key=lambda candidate: -1 if math.isnan(candidate.dice) else candidate.dice)
    information = {
        "folds": list(folds),
        "dataset_name_or_id": dataset_name_or_id,
        "considered_models": models,
        "ensembling_allowed": allow_ensembling,
        "all_results": {name: candidate.dice for name, candidate in candidates.items()},
        "best_model_or_ensemble": _postprocess_best(dataset, best, num_processes),
    }
    results = Path(nnUNet_results, dataset)
    save_json_atomically(information, results / "inference_information.json")
    print_inference_instructions(information, str(results / "inference_instructions.txt"))
    return information


class _Candidate:
    """A model, or several to be averaged, with its cross-validation predictions."""

    def __init__(self, models: Sequence[Model], folder: str) -> None:
        from nnunetv2.evaluation.summary import load_summary_json

        self.models, self.folder = list(models), folder
        self.dice: float = load_summary_json(Path(folder, "summary.json"))["foreground_mean"]["Dice"]


def _score_models(
    dataset: str, models: Sequence[Model], folds: Sequence[int | str], num_processes: int, overwrite: bool
) -> dict[str, _Candidate]:
    from nnunetv2.model_selection.accumulate_cv_results import accumulate_cv_results

    candidates = {}
    for model in models:
        folder = _folder(dataset, model)
        merged = default_merged_folder(folder, folds)
        accumulate_cv_results(folder, merged, folds, num_processes, overwrite)
        candidates[Path(folder).name] = _Candidate([model], merged)
    return candidates


def _score_pairs(
    dataset: str, models: Sequence[Model], folds: Sequence[int | str], num_processes: int, overwrite: bool
) -> dict[str, _Candidate]:
    from nnunetv2.ensembling.ensemble import ensemble_crossvalidations
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

    candidates = {}
    for pair in combinations(models, 2):
        folders = [_folder(dataset, model) for model in pair]
        name = get_ensemble_name(*folders, folds)
        output = os.path.join(nnUNet_results, dataset, "ensembles", name)
        ensemble_crossvalidations(folders, output, folds, num_processes, overwrite=overwrite)
        compute_metrics_on_folder2(
            _references(dataset),
            output,
            os.path.join(output, "dataset.json"),
            os.path.join(output, "plans.json"),
            os.path.join(output, "summary.json"),
            num_processes,
            chill=True,
        )
        candidates[name] = _Candidate(pair, output)
    return candidates


def _postprocess_best(dataset: str, best: _Candidate, num_processes: int) -> dict[str, Any]:
    from nnunetv2.evaluation.summary import load_summary_json
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

    plans_file = os.path.join(best.folder, "plans.json")
    determine_postprocessing(
        best.folder,
        _references(dataset),
        plans_file,
        os.path.join(best.folder, "dataset.json"),
        num_processes,
        keep_postprocessed_files=True,
    )
    after = load_summary_json(Path(best.folder, "postprocessed", "summary.json"))
    return {
        "selected_model_or_models": [
            {"configuration": model["configuration"], "trainer": model["trainer"], "plans_identifier": model["plans"]}
            for model in best.models
        ],
        "postprocessing_file": os.path.join(best.folder, "postprocessing.pkl"),
        "some_plans_file": plans_file,
        "result_on_crossval_pre_pp": best.dice,
        "result_on_crossval_post_pp": after["foreground_mean"]["Dice"],
    }


def _folder(dataset: str, model: Model) -> str:
    return get_output_folder(dataset, model["trainer"], model["plans"], model["configuration"])


def _references(dataset: str) -> str:
    return os.path.join(nnUNet_preprocessed, dataset, "gt_segmentations")


def find_best_configuration_entry_point() -> None:
    """Run `nnUNetv2_find_best_configuration`."""

    def find() -> None:
        args = build_find_parser().parse_args()
        models = dumb_trainer_config_plans_to_trained_models_dict(args.tr, args.c, args.p)
        dataset = maybe_convert_to_dataset_name(args.dataset_name_or_id)
        find_best_configuration(
            dataset,
            models,
            allow_ensembling=not args.disable_ensembling,
            num_processes=args.np,
            overwrite=not args.no_overwrite,
            folds=args.f,
        )

    run_command(find)


def accumulate_crossval_results_entry_point() -> None:
    """Run `nnUNetv2_accumulate_crossval_results`."""

    def accumulate() -> None:
        from nnunetv2.model_selection.accumulate_cv_results import accumulate_cv_results

        args = build_accumulate_parser().parse_args()
        model = get_output_folder(args.dataset_name_or_id, args.tr, args.p, args.c)
        if args.o is not None and Path(args.o).is_dir() and any(Path(args.o).iterdir()):
            raise FileExistsError(f"{args.o} is not empty; name a folder that does not exist yet (-o)")
        output = args.o or default_merged_folder(model, args.f)
        accumulate_cv_results(model, output, args.f)
        show(f"cross-validation results of folds {', '.join(map(str, args.f))} are in {output}")

    run_command(accumulate)


def build_find_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_find_best_configuration`."""
    parser = argparse.ArgumentParser(
        description="Compare trained models and pairs of them by cross-validation, and say how to use the best one."
    )
    parser.add_argument("dataset_name_or_id", help="Dataset name or id.")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="Plans. Default: nnUNetPlans")
    parser.add_argument(
        "-c",
        nargs="+",
        default=list(STANDARD_CONFIGURATIONS),
        help="Configurations; those that are not in the plans are left out. Default: "
        + " ".join(STANDARD_CONFIGURATIONS),
    )
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer"], help="Trainers. Default: nnUNetTrainer")
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        help=f"Cases worked on at the same time. Default: {default_num_processes}",
    )
    _add_folds(parser)
    parser.add_argument("--disable_ensembling", action="store_true", help="Compare single models only.")
    parser.add_argument(
        "--no_overwrite",
        action="store_true",
        help="Use what was accumulated and ensembled before; right only if nothing was trained since.",
    )
    return parser


def build_accumulate_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_accumulate_crossval_results`."""
    parser = argparse.ArgumentParser(description="Collect and score the validation predictions of all folds.")
    parser.add_argument("dataset_name_or_id", help="Dataset name or id.")
    parser.add_argument("-c", required=True, help="Configuration.")
    parser.add_argument(
        "-o",
        default=None,
        help="Output folder, new or empty. Default: crossval_results_folds_... in the model's folder",
    )
    _add_folds(parser)
    parser.add_argument("-p", default="nnUNetPlans", help="Plans. Default: nnUNetPlans")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer. Default: nnUNetTrainer")
    return parser


def _add_folds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f",
        nargs="+",
        type=_parse_fold,
        default=[0, 1, 2, 3, 4],
        help="Folds: numbers, or all for fold_all. Default: 0 1 2 3 4",
    )


def _parse_fold(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no fold: give a number, or all") from None
