"""Predict the validation cases of a fold with the trained network, and score them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import export_case, resample_and_save
from nnunetv2.inference.export_queue import ExportQueue
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.models.networks import bare_network, is_deeply_supervised
from nnunetv2.plans.label_manager import convert_labelmap_to_one_hot
from nnunetv2.plans.partial_labels import scored_classes
from nnunetv2.preprocessed_data.datasets import infer_dataset_class
from nnunetv2.preprocessed_data.journal import read_header
from nnunetv2.training.distributed import wait_for_all
from nnunetv2.training.validation_progress import ValidationProgress, fingerprint_of
from nnunetv2.utilities.atomic_write import remove_leftovers
from nnunetv2.utilities.device import usable_cpu_count, wants_cpu_autocast

if TYPE_CHECKING:
    from nnunetv2.inference.predictor import nnUNetPredictor
    from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

ASIDE = "validation_of_other_cases"
"""Folder of a fold with predictions that an earlier split left."""

NextStage = tuple[str, tuple[int, ...], type]
"""Name, preprocessed shape of the case, and dataset class."""


def validate(
    trainer: nnUNetTrainer,
    *,
    save_probabilities: bool,
    predictor_class: type[nnUNetPredictor],
    compute_metrics: Callable[..., dict],
) -> None:
    """Write segmentations of all validation cases and summary.json into the folder `validation` of the fold.

    Goes on where a validation with the same weights was interrupted. Leaves the network in the mode in which it was.

    Args:
        predictor_class: Predicts the cases.
        compute_metrics: Scores them, as `compute_metrics_on_folder` does.

    Raises:
        RuntimeError: A case failed, or its prediction is gone again; nothing is scored.
    """
    _warn_of_slow_compilation(trainer)
    network = trainer.network
    was_training = network.training
    was_supervised = is_deeply_supervised(network, otherwise=trainer.enable_deep_supervision)
    trainer.set_deep_supervision_enabled(False)
    network.eval()
    try:
        folder = Path(trainer.output_folder, "validation")
        folder.mkdir(parents=True, exist_ok=True)
        label_map_ending = trainer.dataset_json["file_ending"]
        finished = ValidationProgress(folder, [label_map_ending, *([".npz", ".pkl"] if save_probabilities else [])])
        if trainer.local_rank == 0:
            for place in (folder, *_next_stage_folders(trainer)):
                remove_leftovers(place)
            _set_aside_other_cases(trainer, folder)
            finished.open(
                fingerprint_of(
                    bare_network(network),
                    [
                        save_probabilities,
                        trainer.inference_allowed_mirroring_axes,
                        trainer.plans_manager.plans,
                        trainer.configuration_name,
                        wants_cpu_autocast(),
                        trainer.device.type,
                        read_header(Path(trainer.preprocessed_dataset_folder)),
                    ],
                )
            )
        wait_for_all()
        _predict_cases(
            trainer, build_predictor(trainer, predictor_class), folder, finished, save_probabilities=save_probabilities
        )
        wait_for_all()
        if trainer.local_rank == 0:
            _require_predictions(trainer, folder)
            _score(trainer, folder, compute_metrics)
            finished.close()
    finally:
        trainer.set_deep_supervision_enabled(was_supervised)
        network.train(was_training)
        compute_gaussian.cache_clear()


def set_aside_other_cases(folder: Path, cases: Collection[str], ending: str) -> list[str]:
    """Move predictions of other cases out of a folder that is to be scored.

    An earlier split has left them.

    They go to the folder ASIDE beside it, where files of the same name are replaced.

    Args:
        cases: Those to be kept.
        ending: Of label maps.

    Returns:
        The cases moved.
    """
    kinds = (ending, ".npz", ".pkl")
    found = {file.name.removesuffix(kind) for kind in kinds for file in folder.glob(f"*{kind}")}
    others = sorted(found - set(cases))
    aside = folder.with_name(ASIDE)
    for case in others:
        aside.mkdir(exist_ok=True)
        for kind in (*kinds, ".json"):  # a label map in tif has its spacing in the latter
            file = folder / f"{case}{kind}"
            if file.is_file() or file.is_symlink():  # one to nothing would fail the evaluation
                file.replace(aside / file.name)
    return others


def _set_aside_other_cases(trainer: nnUNetTrainer, folder: Path) -> None:
    moved = set_aside_other_cases(folder, list(map(str, trainer.do_split()[1])), trainer.dataset_json["file_ending"])
    if moved:
        trainer.print_to_log_file(
            f"WARNING: {folder} held predictions of {len(moved)} cases that are not for validation in this fold, of an "
            f"earlier split: {', '.join(moved[:10])}{', ...' if len(moved) > 10 else ''}. They are not scored, and lie "
            f"in {ASIDE} beside it now",
            also_print_to_console=True,
        )


def _predict_cases(
    trainer: nnUNetTrainer,
    predictor: nnUNetPredictor,
    folder: Path,
    finished: ValidationProgress,
    *,
    save_probabilities: bool,
) -> None:
    """Predict this process's share of the validation cases, here and for the next stages of a cascade."""
    all_keys = trainer.do_split()[1]
    world_size = distributed.get_world_size() if trainer.is_ddp else 1
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        list(all_keys[trainer.local_rank :: world_size]),
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    num_workers = max(1, min(default_num_processes, usable_cpu_count(), len(dataset.identifiers)))
    with ExportQueue(num_workers) as queue, ThreadPoolExecutor(1, thread_name_prefix="validation-reader") as reader:
        cases = [case for case in dataset.identifiers if case not in finished]
        if len(cases) < len(dataset.identifiers):
            trainer.print_to_log_file(
                f"{len(dataset.identifiers) - len(cases)} cases were predicted before this "
                "validation was interrupted; going on with the others"
            )
        for case, (data, properties) in _read_ahead(
            reader, lambda case: load_network_input(trainer, dataset, case), cases
        ):
            trainer.print_to_log_file(f"predicting {case}")
            trainer.print_to_log_file(f"{case}, shape {tuple(data.shape)}, rank {trainer.local_rank}")
            logits = predictor.predict_sliding_window_return_logits(data).cpu().numpy()
            queue.submit(
                case,
                logits.nbytes,
                _export,
                trainer,
                logits,
                properties,
                folder,
                case,
                list(_next_stages(trainer, case)),
                finished,
                save_probabilities,
            )
        queue.results()


def _read_ahead(
    reader: ThreadPoolExecutor, read: Callable[[str], Any], cases: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield each case with its content, while the next is being read."""
    following = reader.submit(read, cases[0]) if cases else None
    for i, case in enumerate(cases):
        assert following is not None
        content = following.result()
        following = reader.submit(read, cases[i + 1]) if i + 1 < len(cases) else None
        yield case, content


def _export(
    trainer: nnUNetTrainer,
    logits: np.ndarray,
    properties: dict,
    folder: Path,
    case: str,
    next_stages: Sequence[NextStage],
    finished: ValidationProgress,
    save_probabilities: bool,
) -> None:
    """Write a case's segmentation, also for next stages; note it as done."""
    for stage, target_shape, dataset_class in next_stages:
        target_folder = Path(trainer.output_folder_base, "predicted_next_stage", stage)
        target_folder.mkdir(parents=True, exist_ok=True)
        resample_and_save(
            logits,
            target_shape,
            str(target_folder / case),
            trainer.plans_manager,
            trainer.configuration_manager,
            properties,
            trainer.dataset_json,
            default_num_processes,
            dataset_class,
        )
    export_case(
        logits,
        properties,
        trainer.configuration_manager,
        trainer.plans_manager,
        trainer.dataset_json,
        str(folder / case),
        save_probabilities,
    )
    finished.add(case)


def build_predictor(trainer: nnUNetTrainer, predictor_class: type[nnUNetPredictor]) -> nnUNetPredictor:
    """Return a predictor with the present network and the settings of inference."""
    predictor = predictor_class(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=True,
        perform_everything_on_device=True,
        device=trainer.device,
        verbose=False,
        verbose_preprocessing=False,
        allow_tqdm=False,
    )
    # Without DDP, which would compare buffers with processes that predict another number of tiles.
    network = trainer.network.module if isinstance(trainer.network, DistributedDataParallel) else trainer.network
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def load_network_input(trainer: nnUNetTrainer, dataset: nnUNetBaseDataset, case: str) -> tuple[torch.Tensor, dict]:
    """Read a case `(c, *spatial)` and its properties.

    A cascade gets the previous stage's labels as channels.
    """
    data, _, previous, properties = dataset.load_case(case)
    data = data[:]
    if trainer.is_cascaded:
        one_hot = convert_labelmap_to_one_hot(
            previous[:], trainer.label_manager.foreground_labels, output_dtype=data.dtype
        )
        data = np.vstack((data, one_hot))
    return torch.from_numpy(np.ascontiguousarray(data)), properties


def _next_stage_folders(trainer: nnUNetTrainer) -> list[Path]:
    """Return where the predictions go that the next stages of a cascade need."""
    names = trainer.configuration_manager.next_stage_names or []
    return [Path(trainer.output_folder_base, "predicted_next_stage", name) for name in names]


def _next_stages(trainer: nnUNetTrainer, case: str) -> Iterator[NextStage]:
    """Yield name, preprocessed shape of the case and dataset class of each stage that needs this prediction."""
    for name in trainer.configuration_manager.next_stage_names or []:
        identifier = trainer.plans_manager.get_configuration(name).data_identifier
        folder = str(Path(trainer.preprocessed_dataset_folder_base, identifier))
        dataset_class = infer_dataset_class(folder)
        try:
            data, *_ = dataset_class(folder, [case]).load_case(case)
        except FileNotFoundError:
            trainer.print_to_log_file(f"{case} is not preprocessed for {name}: its prediction is not passed on")
            continue
        yield name, tuple(data.shape[1:]), dataset_class


def _require_predictions(trainer: nnUNetTrainer, folder: Path) -> None:
    """Check that all cases were predicted; the scores of some would be taken for those of the fold."""
    cases, ending = list(map(str, trainer.do_split()[1])), trainer.dataset_json["file_ending"]
    missing = [case for case in cases if not (folder / f"{case}{ending}").is_file()]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(cases)} validation cases have no prediction in {folder}: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}. Nothing was scored; --val predicts them"
        )


def _score(trainer: nnUNetTrainer, folder: Path, compute_metrics: Callable[..., dict]) -> None:
    """Compare all predictions with the references and log the result."""
    labels = trainer.label_manager
    world_size = distributed.get_world_size() if trainer.is_ddp else 1
    metrics = compute_metrics(
        str(Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations")),
        str(folder),
        str(folder / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        scored_classes(labels, trainer.dataset_json),
        labels.ignore_label,
        chill=True,
        num_processes=default_num_processes * world_size,
    )
    for label, values in metrics["mean"].items():
        trainer.logger.log_summary(f"final_val/class_{label}_dice", values["Dice"])
    mean_dice = metrics["foreground_mean"]["Dice"]
    trainer.logger.log_summary("final_val/foreground_dice", mean_dice)
    trainer.print_to_log_file("Validation complete", also_print_to_console=True)
    trainer.print_to_log_file("Mean Validation Dice: ", mean_dice, also_print_to_console=True)


def _warn_of_slow_compilation(trainer: nnUNetTrainer) -> None:
    if trainer.is_ddp and trainer.batch_size == 1 and trainer.enable_deep_supervision and trainer._do_i_compile():
        trainer.print_to_log_file(
            "WARNING: validation of a compiled network with batch size 1 per GPU in distributed "
            "training can fail. If it does, validate with --val on one GPU"
        )
