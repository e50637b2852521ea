"""Write down the commands with which the best model of a dataset predicts new images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import shell_command, show

Model = Mapping[str, str]
Option = tuple[str, object | None]


def generate_inference_command(
    dataset_name_or_id: int | str,
    configuration_name: str,
    plans_identifier: str = "nnUNetPlans",
    trainer_name: str = "nnUNetTrainer",
    folds: Sequence[int | str] = (0, 1, 2, 3, 4),
    folder_with_segs_from_prev_stage: str | None = None,
    input_folder: str = "INPUT_FOLDER",
    output_folder: str = "OUTPUT_FOLDER",
    save_npz: bool = False,
) -> str:
    """Return the command that predicts with a model.

    For a cascade, that of its previous stage comes before.

    Args:
        folder_with_segs_from_prev_stage: Predictions of the previous stage that exist already.
        save_npz: Also save probabilities, as ensembles need.

    Returns:
        One command per line.

    Raises:
        FileNotFoundError: The model has no plans.json.
    """
    model = {"configuration": configuration_name, "plans": plans_identifier, "trainer": trainer_name}
    previous_stage = _previous_stage(dataset_name_or_id, model)
    options: list[Option] = [("--save_probabilities", None)] if save_npz else []
    lines = []
    if previous_stage is not None:
        if folder_with_segs_from_prev_stage is None:
            folder_with_segs_from_prev_stage = f"{output_folder}_PREV_STAGE"
            lines.append(
                _predict_command(
                    dataset_name_or_id,
                    {**model, "configuration": previous_stage},
                    folds,
                    input_folder,
                    folder_with_segs_from_prev_stage,
                    [],
                )
            )
        options.append(("-prev_stage_predictions", folder_with_segs_from_prev_stage))
    lines.append(_predict_command(dataset_name_or_id, model, folds, input_folder, output_folder, options))
    return "\n".join(lines)


def print_inference_instructions(inference_info_dict: Mapping[str, Any], instructions_file: str | None = None) -> None:
    """Print the commands of the best model or ensemble: predict, ensemble, postprocess.

    And write them to a file.

    Args:
        inference_info_dict: The content of inference_information.json.
        instructions_file: Where they are written, too.
    """
    text = describe_inference(inference_info_dict)
    show(*text.split("\n"))
    if instructions_file is not None:
        Path(instructions_file).write_text(text + "\n", encoding="utf-8")


def describe_inference(inference_info_dict: Mapping[str, Any]) -> str:
    """Return the text that `print_inference_instructions` prints."""
    dataset, folds = inference_info_dict["dataset_name_or_id"], inference_info_dict["folds"]
    best = inference_info_dict["best_model_or_ensemble"]
    models = best["selected_model_or_models"]
    is_ensemble = len(models) > 1
    sections = ["***Predict new images***"]
    if is_ensemble:
        sections.append(f"{len(models)} models together score best. Predict with each of them, then average:")
    outputs = (
        [f"OUTPUT_FOLDER_MODEL_{number}" for number in range(1, len(models) + 1)] if is_ensemble else ["OUTPUT_FOLDER"]
    )
    for model, output in zip(models, outputs):
        sections.append(
            generate_inference_command(
                dataset,
                model["configuration"],
                model["plans_identifier"],
                model["trainer"],
                folds,
                output_folder=output,
                save_npz=is_ensemble,
            )
        )
    if is_ensemble:
        sections.append("Average the probabilities:")
        sections.append(f"nnUNetv2_ensemble -i {' '.join(outputs)} -o OUTPUT_FOLDER -np {default_num_processes}")
    sections.append("***Postprocess the predictions***")
    sections.append(
        shell_command(
            "nnUNetv2_apply_postprocessing",
            options=[
                ("-i", "OUTPUT_FOLDER"),
                ("-o", "OUTPUT_FOLDER_PP"),
                ("-pp_pkl_file", best["postprocessing_file"]),
                ("-np", default_num_processes),
                ("-plans_json", best["some_plans_file"]),
            ],
        )
    )
    return "\n\n".join(sections)


def _previous_stage(dataset_name_or_id: int | str, model: Model) -> str | None:
    from nnunetv2.plans.plans_manager import PlansManager

    folder = get_output_folder(dataset_name_or_id, model["trainer"], model["plans"], model["configuration"])
    path = Path(folder, "plans.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no trained model: it has no plans.json")
    plans = PlansManager(read_json(path))
    return plans.get_configuration(model["configuration"]).previous_stage_name


def _predict_command(
    dataset_name_or_id: int | str,
    model: Model,
    folds: Sequence[int | str],
    input_folder: str,
    output_folder: str,
    options: Sequence[Option],
) -> str:
    return shell_command(
        "nnUNetv2_predict",
        options=[
            ("-d", dataset_name_or_id),
            ("-i", input_folder),
            ("-o", output_folder),
            *(("-f", fold) for fold in folds),
            ("-tr", model["trainer"]),
            ("-c", model["configuration"]),
            ("-p", model["plans"]),
            *options,
        ],
    )
