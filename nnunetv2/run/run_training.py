"""Train one fold of a configuration: the command nnUNetv2_train and the functions behind it.

Options that stand for a trainer of one's own are in `run/training_options.py`. `--seed`, or the environment variable
nnUNet_seed, seeds all generators; see `training/seeding.py`.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.plans.partial_labels import unannotated_labels
from nnunetv2.run import applied_options, processes, training_options
from nnunetv2.run.fine_tuning import start_from_pretrained_weights
from nnunetv2.training import stopping
from nnunetv2.training.differential_privacy.options import PrivacyOptions, add_privacy_options, options_of
from nnunetv2.training.options import NO_OPTIONS, TrainingOptions, split_results_name
from nnunetv2.training.seeding import seed_everything, seed_from_environment, seed_restored, use_seed
from nnunetv2.utilities.command_line import add_device_option, run_command
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_files import DATASET, PLANS, read_json
from nnunetv2.utilities.legacy_names import names_from, origins
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    import torch

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

_RULE = 88 * "#"
PRESETS_HINT = f"""
{_RULE}
You are training with the default plans. The residual encoder presets segment better on most
datasets: plan with -pl nnUNetPlannerResEncM (L, XL), then train with -p nnUNetResEncUNetMPlans.
{_RULE}
"""

# Names of other modules that programs import from here, or replace here by their own.
_ORIGINS = origins(
    {
        "batchgenerators.utilities.file_and_folder_operations": "isfile join load_json",
        "nnunetv2.run.load_pretrained_weights": "load_pretrained_weights",
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": "nnUNetTrainer",
        "nnunetv2.utilities.find_objects": "recursive_find_trainer_class_by_name",
        "typing": "Optional Union",
    },
    cudnn="torch.backends.cudnn",
    dist="torch.distributed",
    mp="torch.multiprocessing",
    multiprocessing="multiprocessing",
    torch="torch",
)

__all__ = [
    "cleanup_ddp",
    "find_free_network_port",
    "get_trainer_from_args",
    "maybe_convert_to_dataset_name",
    "maybe_load_checkpoint",
    "nnUNet_preprocessed",
    "os",
    "run_ddp",
    "run_training",
    "run_training_entry",
    "setup_ddp",
    "socket",
    *_ORIGINS,
]
__getattr__ = names_from(_ORIGINS, __name__)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that was asked for, as `run_training` explains it, but for devices and processes."""

    dataset_name_or_id: str | int
    configuration: str
    fold: int | str
    trainer_name: str
    plans_identifier: str
    options: TrainingOptions
    pretrained_weights: str | None
    continue_training: bool
    only_run_validation: bool
    no_validation: bool
    val_with_best: bool
    export_validation_probabilities: bool
    disable_checkpointing: bool


def run_training_entry() -> None:
    """Run `nnUNetv2_train`."""
    run_command(main)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    arguments = build_parser().parse_args(argv)
    limit_threads(arguments.device)
    options = training_options.options_from(arguments)
    with stopping.listening():
        _train(arguments, options)


def limit_threads(device_type: str) -> None:
    """Give every library one thread, unless the user chose another number.

    Before NumPy and torch are imported.

    Augmentation workers would otherwise start a team of threads each. On a CPU the training itself needs the team, so
    the number for OpenMP stays as it is (see `set_torch_threads`), and workers limit themselves.
    """
    libraries = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    for name in libraries if device_type == "cpu" else ("OMP_NUM_THREADS", *libraries):
        os.environ.setdefault(name, "1")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_train`."""
    parser = argparse.ArgumentParser(
        description="Train one fold of a configuration, then predict its validation cases."
    )
    parser.add_argument("dataset_name_or_id", help="Dataset: its name or id.")
    parser.add_argument("configuration", help="Configuration, for example 2d or 3d_fullres.")
    parser.add_argument("fold", help="Fold of the cross-validation: 0, 1, ... or 'all' to train with all cases.")
    parser.add_argument("-tr", default="nnUNetTrainer", help="Trainer class name. Default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans identifier. Default: nnUNetPlans")
    training_options.add_fine_tuning_options(parser)
    parser.add_argument(
        "-num_gpus", type=int, default=1, help="Number of GPUs to train on; with -device cpu, of processes. Default: 1"
    )
    parser.add_argument(
        "--npz", action="store_true", help="Also save the probabilities of the final validation, for ensembling."
    )
    parser.add_argument(
        "--c", action="store_true", help="Continue: go on from the checkpoint with most epochs behind it."
    )
    parser.add_argument("--val", action="store_true", help="Only validate; the training must be finished.")
    parser.add_argument(
        "--val_best",
        action="store_true",
        help="Validate with checkpoint_best instead of checkpoint_final. Writes into the same folder 'validation'.",
    )
    parser.add_argument(
        "--no_validation",
        action="store_true",
        help="End when the network is trained, without the final validation; --val makes up for it.",
    )
    parser.add_argument("--disable_checkpointing", action="store_true", help="Save no checkpoints; for trials.")
    add_device_option(parser)
    training_options.add_training_options(parser)
    add_privacy_options(parser)
    return parser


def run_training(
    dataset_name_or_id: str | int,
    configuration: str,
    fold: int | str,
    trainer_class_name: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    pretrained_weights: str | None = None,
    num_gpus: int = 1,
    export_validation_probabilities: bool = False,
    continue_training: bool = False,
    only_run_validation: bool = False,
    disable_checkpointing: bool = False,
    val_with_best: bool = False,
    device: torch.device | None = None,
    options: TrainingOptions = NO_OPTIONS,
    privacy: PrivacyOptions | None = None,
    no_validation: bool = False,
) -> None:
    """Train a fold, unless only its validation is asked for, and predict its validation cases.

    Args:
        fold: Its number, also as text, or 'all'.
        pretrained_weights: Checkpoint whose weights the network starts from.
        num_gpus: With more than one, a process per GPU trains (on a CPU, that many processes).
        export_validation_probabilities: Store probabilities beside the predicted segmentations.
        continue_training: Go on from the latest checkpoint.
        val_with_best: Validate with checkpoint_best.
        device: Where to train. Default: CUDA.
        options: Settings that replace those of the trainer.
        privacy: Options of a trainer with differential privacy.
        no_validation: Leave the validation cases for a later command.

    Raises:
        AssertionError: Two options exclude each other.
        ValueError: The fold is neither a number nor 'all', or one of `options` contradicts the trainer, a finished
            training or the others.
        RuntimeError: nnUNet_preprocessed or nnUNet_results is unset, a checkpoint is missing, or pretrained weights are
            to be loaded into a continued training.
    """
    import torch

    device = torch.device("cuda") if device is None else device
    fold = parse_fold(fold)
    trainer_class_name, options = split_results_name(trainer_class_name, options)
    _check_privacy(trainer_class_name, privacy, num_gpus=num_gpus, only_run_validation=only_run_validation)
    job = _Job(
        dataset_name_or_id=dataset_name_or_id,
        configuration=configuration,
        fold=fold,
        trainer_name=trainer_class_name,
        plans_identifier=plans_identifier,
        options=options,
        pretrained_weights=pretrained_weights,
        continue_training=continue_training,
        only_run_validation=only_run_validation,
        no_validation=no_validation,
        val_with_best=val_with_best,
        export_validation_probabilities=export_validation_probabilities,
        disable_checkpointing=disable_checkpointing,
    )
    _check_options(job)
    for root in (nnUNet_preprocessed, nnUNet_results):
        root.require()
    if plans_identifier == "nnUNetPlans":
        show(*PRESETS_HINT.split("\n"))
    processes.check_device(device, num_gpus)
    if processes.are_launched_by_torchrun():
        rank, world_size = processes.torchrun_rank(num_gpus)
        _run_ddp(rank, job, world_size, device.type)
    elif num_gpus > 1:
        processes.spawn(_run_ddp, (job, num_gpus, device.type), num_gpus, find_free_network_port)
    else:
        _run_alone(job, device, privacy)


def _run_alone(job: _Job, device: torch.device, privacy: PrivacyOptions | None) -> None:
    """Run a job in this process."""
    with seed_restored():
        _seed(0, job.options)
        trainer = _build_trainer(job, device)
        if privacy is not None:
            setattr(trainer, "privacy_options", privacy)  # noqa: B010  trainers without have been refused
        _run(trainer, job)


def run_ddp(
    rank: int,
    dataset_name_or_id: str | int,
    configuration: str,
    fold: int | str,
    tr: str,
    p: str,
    disable_checkpointing: bool,
    c: bool,
    val: bool,
    pretrained_weights: str | None,
    npz: bool,
    val_with_best: bool,
    world_size: int,
    device_type: str = "cuda",
    options: TrainingOptions = NO_OPTIONS,
    no_validation: bool = False,
) -> None:
    """Be one of several processes that train together.

    Each with a GPU, or with its share of the processor.
    """
    job = _Job(
        dataset_name_or_id=dataset_name_or_id,
        configuration=configuration,
        fold=fold,
        trainer_name=tr,
        plans_identifier=p,
        options=options,
        pretrained_weights=pretrained_weights,
        continue_training=c,
        only_run_validation=val,
        no_validation=no_validation,
        val_with_best=val_with_best,
        export_validation_probabilities=npz,
        disable_checkpointing=disable_checkpointing,
    )
    _run_ddp(rank, job, world_size, device_type)


def _run_ddp(rank: int, job: _Job, world_size: int, device_type: str) -> None:
    import torch

    with stopping.listening(), seed_restored():
        setup_ddp(rank, world_size, device_type)
        try:
            if device_type == "cuda":
                torch.cuda.set_device(processes.local_rank(rank))
            else:
                processes.share_cores(world_size)
            _seed(rank, job.options)
            _run(_build_trainer(job, torch.device(device_type)), job)
        finally:
            cleanup_ddp()


def get_trainer_from_args(
    dataset_name_or_id: str | int,
    configuration: str,
    fold: int | str,
    trainer_name: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    continue_training: bool = False,
    device: torch.device | None = None,
    results_name: str | None = None,
) -> nnUNetTrainer:
    """Construct the trainer of this name for a preprocessed dataset.

    Args:
        results_name: Ending of the trainer's name in the folder of the results.

    Raises:
        ValueError: The dataset is neither a name nor an id.
        FileNotFoundError: Its plans or its dataset.json are not in nnUNet_preprocessed.
        RuntimeError: There is no such trainer or dataset.
    """
    import torch

    from nnunetv2.run import run_training as public  # programs may have put a function of their own there

    trainer_class = public.recursive_find_trainer_class_by_name(trainer_name)
    folder = _preprocessed_folder(dataset_name_or_id)
    plans = _read_json(folder / f"{plans_identifier}.json", PLANS)
    dataset_json = _read_json(folder / "dataset.json", DATASET)
    if unannotated_labels(dataset_json) and not getattr(trainer_class, "trains_partial_labels", False):
        show(
            f"WARNING: {folder.name} was planned with classes that are not annotated here, and {trainer_name} takes "
            "their voxels for background: train with a trainer for federations, or plan without --federated"
        )
    return trainer_class(
        plans={
            **plans,
            "continue_training": continue_training,
            **({"results_name": results_name} if results_name else {}),
        },
        configuration=configuration,
        fold=fold,
        dataset_json=dataset_json,
        device=torch.device("cuda") if device is None else device,
    )


def maybe_load_checkpoint(
    nnunet_trainer: nnUNetTrainer,
    continue_training: bool,
    validation_only: bool,
    pretrained_weights_file: str | None = None,
    *,
    pretrained_heads: str | None = None,
) -> None:
    """Bring a trainer to where it shall start.

    The latest checkpoint, the final one, or pretrained weights.

    Args:
        pretrained_heads: See `TrainingOptions.pretrained_heads`.

    Raises:
        RuntimeError: Pretrained weights are to be loaded into a continued training, or a validation is to run without
            a final checkpoint.
    """
    from nnunetv2.models.checkpoint_file import FINAL
    from nnunetv2.run import load_pretrained_weights as strict
    from nnunetv2.run import run_training as public

    if continue_training and pretrained_weights_file is not None:
        raise RuntimeError(
            "-pretrained_weights are for the start of a training; --c goes on with the weights of an "
            "earlier start. Use one of them"
        )
    if continue_training:
        _load_most_advanced_checkpoint(nnunet_trainer)
    elif validation_only:
        _load_checkpoint_named(nnunet_trainer, FINAL)
    elif pretrained_weights_file is not None:
        if not nnunet_trainer.was_initialized:
            nnunet_trainer.initialize()
        if public.load_pretrained_weights is strict.load_pretrained_weights:
            start_from_pretrained_weights(nnunet_trainer, pretrained_weights_file, heads=pretrained_heads)
        else:  # a program has put its own there
            public.load_pretrained_weights(nnunet_trainer.network, pretrained_weights_file, verbose=True)
        nnunet_trainer.pretrained_weights = pretrained_weights_file  # the sites of a federation compare them


def parse_fold(fold: int | str) -> int | str:
    """Return the number of a fold, or 'all'.

    Raises:
        ValueError: It is neither, or negative.
    """
    if fold == "all":
        return fold
    try:
        number = int(fold)
    except ValueError as error:
        raise ValueError(f"fold is {fold!r}: expected a whole number such as 0, or 'all'") from error
    if number < 0:
        raise ValueError(f"fold is {number}: folds are counted from 0")
    return number


def find_free_network_port() -> int:
    """Return a TCP port of this machine that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def setup_ddp(rank: int, world_size: int, device_type: str = "cuda") -> None:
    """Join the processes of a distributed training."""
    from torch import distributed

    distributed.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=world_size, timeout=processes.LONGEST_WAIT
    )


def cleanup_ddp() -> None:
    """Leave the processes of a distributed training."""
    from torch import distributed

    distributed.destroy_process_group()


def _train(args: argparse.Namespace, options: TrainingOptions) -> None:
    from nnunetv2.utilities.device import resolve_device, set_torch_threads

    privacy = options_of(args)
    with _without_garbage_collection():
        import nnunetv2.training.nnUNetTrainer.nnUNetTrainer  # noqa: F401  every trainer needs it, and torch
    device = resolve_device(args.device)
    set_torch_threads(device.type)
    run_training(
        args.dataset_name_or_id,
        args.configuration,
        args.fold,
        args.tr,
        args.p,
        args.pretrained_weights,
        args.num_gpus,
        args.npz,
        args.c,
        args.val,
        args.disable_checkpointing,
        args.val_best,
        device=device,
        options=options,
        privacy=privacy,
        no_validation=args.no_validation,
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Import without looking for garbage, of which there is none: that makes up a sixth of the time.

    Imported modules stay out of later collections, and so in memory that worker processes share.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _check_options(job: _Job) -> None:
    """Refuse options that exclude each other before anything is written."""
    assert not (job.val_with_best and job.disable_checkpointing), (
        "--val_best needs checkpoint_best, which --disable_checkpointing does not save"
    )
    assert not (job.continue_training and job.only_run_validation), (
        "--c goes on training, --val only validates: use one of them"
    )
    if job.no_validation:
        asked_for = {
            "--val": job.only_run_validation,
            "--val_best": job.val_with_best,
            "--npz": job.export_validation_probabilities,
        }
        if named := [option for option, is_given in asked_for.items() if is_given]:
            raise ValueError(f"--no_validation leaves out what {named[0]} asks for: use one of them")
    if job.pretrained_weights is not None:
        if job.continue_training:
            raise RuntimeError(
                "-pretrained_weights are for the start of a training, --c goes on with an earlier one: use one of them"
            )
        if not Path(job.pretrained_weights).is_file():
            raise FileNotFoundError(f"there are no pretrained weights {job.pretrained_weights}")
    elif job.options.pretrained_heads is not None:
        raise ValueError(
            f"--pretrained_heads {job.options.pretrained_heads} needs -pretrained_weights, which is missing"
        )
    applied_options.refuse_for_validation(job.options, only_run_validation=job.only_run_validation)


def _build_trainer(job: _Job, device: torch.device) -> nnUNetTrainer:
    """Construct a trainer as `get_trainer_from_args` does, unless an option is refused."""
    from nnunetv2.run import run_training as public

    options = job.options
    if options.given():
        applied_options.refuse_options(public.recursive_find_trainer_class_by_name(job.trainer_name), options)
    if options.class_weights is not None:
        dataset_json = _read_json(_preprocessed_folder(job.dataset_name_or_id) / "dataset.json", DATASET)
        applied_options.refuse_unknown_classes(options, dataset_json)
    return get_trainer_from_args(
        job.dataset_name_or_id,
        job.configuration,
        job.fold,
        job.trainer_name,
        job.plans_identifier,
        # A validation goes on with the logs of a training, and deletes nothing of them.
        job.continue_training or job.only_run_validation,
        device,
        **({"results_name": options.results_name} if options.results_name else {}),
    )


def _check_privacy(
    trainer_name: str, privacy: PrivacyOptions | None, *, num_gpus: int, only_run_validation: bool
) -> None:
    """Refuse options of differential privacy without effect, and private trainers with several processes."""
    is_ddp = num_gpus > 1 or processes.are_launched_by_torchrun()
    if privacy is None and not is_ddp:
        return
    from nnunetv2.run import run_training as public
    from nnunetv2.training.differential_privacy.refusals import check_process

    is_private = hasattr(public.recursive_find_trainer_class_by_name(trainer_name), "privacy_options")
    if privacy is not None and not is_private:
        raise ValueError(
            f"{trainer_name} trains without differential privacy, so the options --dp... cannot be used: choose "
            "-tr nnUNetTrainerDP, or nnUNetTrainerDPAsymFedAvg in a federation"
        )
    if privacy is not None and only_run_validation:
        raise ValueError("--val only validates: leave out the options --dp...")
    if is_private:
        check_process(is_ddp=is_ddp, has_grad_scaler=False)


def _run(trainer: nnUNetTrainer, job: _Job) -> None:
    """Load a checkpoint or weights, train, validate."""
    from nnunetv2.models.checkpoint_file import BEST

    if job.disable_checkpointing:  # a trainer may say so by itself
        trainer.disable_checkpointing = True
    if not job.only_run_validation:
        applied_options.prepare_trainer_(trainer, job.options, continue_training=job.continue_training)
    if not (job.only_run_validation and job.val_with_best):
        maybe_load_checkpoint(
            trainer,
            job.continue_training,
            job.only_run_validation,
            job.pretrained_weights,
            pretrained_heads=job.options.pretrained_heads,
        )
    _let_cudnn_choose_fast_algorithms()
    if not job.only_run_validation:
        trainer.run_training()
    if job.no_validation:
        return
    if job.val_with_best:
        _load_checkpoint_named(trainer, BEST)
    trainer.perform_actual_validation(job.export_validation_probabilities)


def _load_most_advanced_checkpoint(trainer: nnUNetTrainer) -> None:
    """Load the checkpoint with most epochs of the latest training; where there is none at all, start anew.

    Raises:
        DamagedCheckpointError: There are checkpoints, but none can be used. The training would replace them.
    """
    from nnunetv2.models.checkpoint_file import DamagedCheckpointError, find_checkpoints, rank_checkpoints

    def warn(line: str) -> None:
        trainer.print_to_log_file(f"WARNING: {line}")

    for path in rank_checkpoints(trainer.output_folder, warn):
        try:
            trainer.load_checkpoint(str(path))
        except DamagedCheckpointError as error:
            warn(f"{error}. Trying the next checkpoint")
            continue
        trainer.print_to_log_file(f"Going on from {path.name} at epoch {trainer.current_epoch}")
        return
    if found := find_checkpoints(trainer.output_folder):
        names = ", ".join(path.name for path in found)
        raise DamagedCheckpointError(
            f"cannot go on: none of the checkpoints in {trainer.output_folder} can be used ({names}). Bring one back "
            "from a backup, or start anew without --c, which replaces them"
        )
    warn(f"no checkpoint in {trainer.output_folder} to continue from: the training starts anew")


def _load_checkpoint_named(trainer: nnUNetTrainer, name: str) -> None:
    path = Path(trainer.output_folder, name)
    if not path.is_file():
        raise RuntimeError(f"cannot validate: there is no {path}. Finish the training first (--c goes on with it)")
    trainer.load_checkpoint(str(path))


def _let_cudnn_choose_fast_algorithms() -> None:
    import torch

    if torch.cuda.is_available() and seed_from_environment() is None:
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.benchmark = True


def _seed(rank: int, options: TrainingOptions) -> None:
    """Seed this process if the user wants that; every process draws other samples."""
    if options.seed is not None:
        use_seed(options.seed)
    seed = seed_from_environment()
    if seed is not None:
        seed_everything(seed + rank)


def _preprocessed_folder(dataset_name_or_id: str | int) -> Path:
    return Path(nnUNet_preprocessed) / maybe_convert_to_dataset_name(dataset_name_or_id)


def _read_json(path: Path, required: Mapping[str, type]) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: plan and preprocess the dataset first "
            "(nnUNetv2_plan_and_preprocess), or check -p and the dataset"
        )
    return read_json(path, required=required, refuse_duplicates=True)


if __name__ == "__main__":
    run_training_entry()
