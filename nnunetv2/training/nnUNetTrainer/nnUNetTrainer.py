"""Train a network as its plans say.

Third-party trainers override methods and attributes of this class.

The methods are hooks. The functions that they call live in modules of their own, beside the package of trainers.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import distributed, nn

from nnunetv2.experiment_planning.experiment_planners.hints import describe_too_small
from nnunetv2.models import checkpoint_file as checkpoint_files
from nnunetv2.models.model_folder import save_model_description
from nnunetv2.models.network_from_plans import get_network_from_plans
from nnunetv2.models.networks import bare_network, build_network, deep_supervision_scales, speed_up_on_cpu_
from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager, determine_num_input_channels
from nnunetv2.preprocessed_data.datasets import infer_dataset_class
from nnunetv2.training import log_file as log_files
from nnunetv2.training import splits, steps, training_folders
from nnunetv2.training.background_writer import BackgroundWriter
from nnunetv2.training.batch_shares import loss_weight_of_rank, oversampling_of_rank, split_batch_size
from nnunetv2.training.bf16_gradients import describe_wrong_gradients
from nnunetv2.training.compiling import wants_compilation
from nnunetv2.training.data_augmentation.default_transforms import (
    build_training_transforms,
    build_validation_transforms,
    rotation_and_patch_size,
)
from nnunetv2.training.data_pipeline import start_augmenters, stop_augmenters
from nnunetv2.training.debug_information import describe_trainer
from nnunetv2.training.distributed import (
    device_of_process,
    distribute,
    from_first_process,
    gather,
    is_distributed,
    wait_for_all,
)
from nnunetv2.training.first_batch import draw_first_batch
from nnunetv2.training.folder_lock import training_in
from nnunetv2.training.freezing import freeze_, keep_frozen_statistics_
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper, deep_supervision_weights
from nnunetv2.training.loss.default_loss import build_default_loss
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.reexports import ORIGINS
from nnunetv2.training.optimization import build_grad_scaler, build_sgd
from nnunetv2.training.options import OptionError, TrainingOptions
from nnunetv2.training.progress_line import Position, ProgressLine
from nnunetv2.training.seeding import seed_epoch
from nnunetv2.training.snapshot import SnapshotTaker, save_snapshot_file
from nnunetv2.training.step_results import as_result, fetch, latest_loss
from nnunetv2.training.stopping import StopConditions
from nnunetv2.training.training_state import describe_state, restore_state_
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.device import autocast_context, wants_cpu_autocast
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.legacy_names import names_from
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

    from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset

__getattr__ = names_from(ORIGINS, __name__)
__all__ = ["nnUNetTrainer", *ORIGINS]

HYPERPARAMETERS = (
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "num_epochs",
    "enable_deep_supervision",
)

HOOKS_THAT_MAY_READ_CHECKPOINTS = ("save_checkpoint", "on_epoch_end", "on_train_epoch_end")
"""Trainers extend them to copy or upload the checkpoint that was saved last; others do not wait for it."""

CUDA = torch.device("cuda")

Geometry = tuple[tuple[float, float], bool, Any, tuple[int, ...] | None]
"""Rotation, dummy 2D augmentation, size of the patch to augment from (ints), mirror axes."""

Folder = Any
"""A str, or None below a root that is not set: writing there fails with a message of its own."""

_LATER: Any = None
"""The value of an attribute before the hook that fills it in."""


class nnUNetTrainer:
    """Train one fold of one configuration of a dataset.

    A subclass calls this constructor and then changes attributes, or overrides hooks; nothing is built before
    `initialize`. Constructing needs no environment variable: without nnUNet_results there is no output folder, and
    writing into it fails.

    Args:
        plans: Content of the plans file, not changed. The keys `continue_training` (an earlier training goes on) and
            `results_name` (ending of the trainer's name in the output folder), if there, are not stored.
        configuration: Name of a configuration in the plans, such as 3d_fullres.
        fold: Number of the fold, or 'all'.
        dataset_json: Content of dataset.json.
        device: Where to train. With distributed training every process takes the GPU of its rank.
        unpack_dataset: Not used. Trainers written for earlier releases pass it, some of them by position, before
            the device.
    """

    leaves_checkpoint_files_alone = True
    """Whether the hooks that this very class defines do without the files; a subclass has to say so for its own."""

    max_gradient_norm: float = steps.MAX_GRADIENT_NORM
    """The norm to which `train_step` clips the gradient."""

    training_options = TrainingOptions()
    """The options of the user; they were set after construction, over the settings of the class."""

    refused_options: Mapping[str, str] = {}
    """Fields of `TrainingOptions` that the trainer refuses, and `stop` if it is not to be stopped: name -> why."""

    stopped = ""
    """Why the training has ended before its last epoch; empty as long as it has not."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = CUDA,
        unpack_dataset: bool | torch.device | None = None,
    ):
        if isinstance(device, bool):
            device = unpack_dataset if isinstance(unpack_dataset, torch.device) else CUDA
        self.is_ddp = is_distributed()
        self.local_rank = distributed.get_rank() if self.is_ddp else 0
        self.device = device_of_process(device, self.local_rank)
        show(f"Training on {self.device}" + (f" (process {self.local_rank})" if self.is_ddp else ""))

        continue_training, self.results_name = plans.get("continue_training", False), plans.get("results_name")
        plans = {key: value for key, value in plans.items() if key not in ("continue_training", "results_name")}
        self.my_init_kwargs: dict[str, Any] = {
            "plans": plans,
            "configuration": configuration,
            "fold": fold,
            "dataset_json": dataset_json,
            "device": self.device,
        }
        self.plans_manager = PlansManager(plans)
        self.configuration_manager: ConfigurationManager = self.plans_manager.get_configuration(configuration)
        self.configuration_name = configuration
        self.dataset_json = dataset_json
        self.fold = fold
        self._set_folders()

        self.num_epochs, self.current_epoch = 1000, 0
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 250, 50
        self.initial_lr, self.weight_decay = 0.01, 3e-5
        self.enable_deep_supervision = True
        self.oversample_foreground_percent, self.probabilistic_oversampling = 0.33, False
        self.freeze_patterns: tuple[str, ...] = ()  # patterns, see `training/freezing.py`

        # Filled in by initialize() and on_train_start().
        self.dataset_class: type[nnUNetBaseDataset] = _LATER
        self.label_manager = self.plans_manager.get_label_manager(dataset_json)
        self.num_input_channels: int = _LATER
        self.network: nn.Module = _LATER
        self.optimizer: torch.optim.Optimizer = _LATER
        self.lr_scheduler: Any = _LATER
        self.loss: nn.Module = _LATER
        self.grad_scaler = build_grad_scaler(self.device)
        self.dataloader_train: Iterator[dict] = _LATER
        self.dataloader_val: Iterator[dict] = _LATER

        self._keeps_float32: bool | None = None  # decided with the first batch
        self._loss_weight = 1.0  # of this process, where processes have batches of unequal size
        self._best_ema: float | None = None
        self.inference_allowed_mirroring_axes: tuple[int, ...] | None = None
        self.save_every = 50
        self.disable_checkpointing = False
        self.was_initialized = False
        self._stop_conditions: StopConditions = _LATER

        # Keep files and the terminal out of the way of training.
        self._progress = ProgressLine(sys.stdout, is_enabled=self.local_rank == 0)
        self._writer, self._snapshots = BackgroundWriter(), SnapshotTaker()
        self._is_writing_in_background = False
        self._has_to_draw_examples = self.local_rank == 0

        self._open_output_folder(continue_training)
        self._greet()

    # ---------------------------------------------------------------- construction

    def _set_folders(self) -> None:
        """Derive the folders of this training; those below a root that is not set are None."""
        folders = training_folders.locate_folders(
            self.plans_manager, self.configuration_name, self.fold, type(self).__name__, self.results_name
        )
        self.preprocessed_dataset_folder_base: Folder = folders.preprocessed_dataset_folder_base
        self.preprocessed_dataset_folder: Folder = folders.preprocessed_dataset_folder
        self.output_folder_base: Folder = folders.output_folder_base
        self.output_folder: Folder = folders.output_folder
        self.is_cascaded = self.configuration_manager.previous_stage_name is not None
        self.folder_with_segs_from_previous_stage: Folder = folders.folder_with_segs_from_previous_stage

    def _open_output_folder(self, continue_training: bool) -> None:
        """Create the output folder and the logger. The log file appears with the first line after construction."""
        self.log_file = None
        if self.output_folder is not None:
            Path(self.output_folder).mkdir(parents=True, exist_ok=True)
            self.log_file = os.path.join(self.output_folder, log_files.log_file_name(datetime.now()))
        self.logger = MetaLogger(self.output_folder, continue_training)
        self.logger.update_config(
            {
                "plans": self.plans_manager.plans,
                "configuration": self.configuration_name,
                "fold": self.fold,
                "dataset": self.dataset_json,
            }
        )

    def _greet(self) -> None:
        if self.local_rank == 0:
            show(*log_files.CITATION.split("\n"))

    # ---------------------------------------------------------------- initialization

    def initialize(self) -> None:
        """Build network, optimizer, schedule and loss.

        Raises:
            RuntimeError: Called a second time.
        """
        if self.was_initialized:
            raise RuntimeError("initialize() was called twice; a trainer builds its network once")
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        self.network = speed_up_on_cpu_(self._build_network().to(self.device), self.device)
        if self.freeze_patterns:  # before DDP and torch.compile look at the network
            if "freeze" in self.refused_options:
                raise OptionError(f"{type(self).__name__} freezes nothing: {self.refused_options['freeze']}")
            self.print_to_log_file(freeze_(self.network, self.freeze_patterns))
        if self._do_i_compile():
            self.print_to_log_file("Compiling the network with torch.compile; the first iterations take longer")
            self.network = cast(nn.Module, torch.compile(self.network))
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            self.network = distribute(self.network, self.device, has_unused_parameters=not self.enable_deep_supervision)
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self._require(self.preprocessed_dataset_folder))
        self.was_initialized = True
        self.logger.update_config(
            {
                "hparas": {
                    **{name: getattr(self, name) for name in HYPERPARAMETERS},
                    "batch_size": self.configuration_manager.batch_size,
                }
            }
        )

    def _build_network(self) -> nn.Module:
        return build_network(
            self.build_network_architecture,
            plans_manager=self.plans_manager,
            configuration_manager=self.configuration_manager,
            dataset_json=self.dataset_json,
            num_input_channels=self.num_input_channels,
            num_output_channels=self.label_manager.num_segmentation_heads,
            enable_deep_supervision=self.enable_deep_supervision,
        )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of a configuration, initialised, without a final non-linearity.

        Inference calls this on the class. With deep supervision the network returns a list of outputs, highest
        resolution first.
        """
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )

    def _set_batch_size_and_oversample(self) -> None:
        """Set the batch size of this process, and how many of its samples must show foreground."""
        batch_size = self.configuration_manager.batch_size
        if self.is_ddp:
            world_size = distributed.get_world_size()
            self._loss_weight = loss_weight_of_rank(batch_size, world_size, self.local_rank)
            self.oversample_foreground_percent = oversampling_of_rank(
                batch_size, world_size, self.local_rank, self.oversample_foreground_percent
            )
            batch_size = split_batch_size(batch_size, world_size)[self.local_rank]
            show(
                f"Process {self.local_rank}: batch size {batch_size}, "
                f"foreground oversampling {self.oversample_foreground_percent}"
            )
        self.batch_size = batch_size

    def _do_i_compile(self) -> bool:
        """Tell whether to use torch.compile: on CUDA, unless the environment variable nnUNet_compile says no."""
        return wants_compilation(self.device, self.print_to_log_file)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return SGD with Nesterov momentum, and a learning rate that falls polynomially over the epochs."""
        optimizer = build_sgd(
            self.network, initial_lr=self.initial_lr, weight_decay=self.weight_decay, device=self.device
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        """Return Dice plus cross entropy, added up over the outputs of deep supervision."""
        loss: Any = build_default_loss(
            self.label_manager, batch_dice=self.configuration_manager.batch_dice, ddp=self.is_ddp
        )
        if self._do_i_compile():
            loss.dc = torch.compile(loss.dc)
        return self._over_all_outputs(loss)

    def _over_all_outputs(self, loss: nn.Module) -> nn.Module:
        """Add a loss up over the outputs of deep supervision; without it, return the loss as it is."""
        if not self.enable_deep_supervision:
            return loss
        scales = self._get_deep_supervision_scales()
        if not scales:
            raise ValueError(
                describe_too_small(self.configuration_name, self.configuration_manager.median_image_size_in_voxels)
            )
        # DDP fails on parameters without a gradient, unless the network is compiled.
        weights = deep_supervision_weights(len(scales), keep_last_tiny=self.is_ddp and not self._do_i_compile())
        return DeepSupervisionWrapper(loss, weights)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Return the size of each output relative to the input; None without deep supervision."""
        if not self.enable_deep_supervision:
            return None
        return deep_supervision_scales(self.configuration_manager.pool_op_kernel_sizes)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the network between returning all outputs and only the one of highest resolution."""
        decoder: Any = bare_network(self.network).decoder
        decoder.deep_supervision = enabled

    # ---------------------------------------------------------------- data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Geometry:
        """Decide rotation, dummy 2D augmentation, initial patch size and mirror axes.

        Rotation in radians; the patch is the one to augment from.
        """
        rotation, dummy_2d, initial_patch_size, mirror_axes = rotation_and_patch_size(
            self.configuration_manager.patch_size
        )
        self.print_to_log_file(f"do_dummy_2d_data_aug: {dummy_2d}")
        self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(
        patch_size: Sequence[int],
        rotation_for_DA: Any,
        deep_supervision_scales: Sequence | None,
        mirror_axes: tuple[int, ...] | None,
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm: Sequence[bool] | None = None,
        is_cascaded: bool = False,
        foreground_labels: Sequence[int] | None = None,
        regions: Sequence | None = None,
        ignore_label: int | None = None,
    ) -> BasicTransform:
        """Build the augmentation; its attribute `transforms` is a list that may be edited."""
        return build_training_transforms(
            patch_size,
            rotation_for_DA,
            deep_supervision_scales,
            mirror_axes,
            do_dummy_2d_data_aug,
            use_mask_for_norm=use_mask_for_norm,
            is_cascaded=is_cascaded,
            foreground_labels=foreground_labels,
            regions=regions,
            ignore_label=ignore_label,
        )

    @staticmethod
    def get_validation_transforms(
        deep_supervision_scales: Sequence | None,
        is_cascaded: bool = False,
        foreground_labels: Sequence[int] | None = None,
        regions: Sequence | None = None,
        ignore_label: int | None = None,
    ) -> BasicTransform:
        """Build the transforms from validation patches to inputs and targets, without augmentation."""
        return build_validation_transforms(
            deep_supervision_scales,
            is_cascaded=is_cascaded,
            foreground_labels=foreground_labels,
            regions=regions,
            ignore_label=ignore_label,
        )

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training and the validation cases of the fold.

        Write splits_final.json if there is none.

        Raises:
            FileNotFoundError: Cases of the split are not preprocessed.
        """
        folder = self._require(self.preprocessed_dataset_folder)
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(folder)

        def identifiers() -> list[str]:
            return list(self.dataset_class.get_identifiers(folder))

        splits.report_bad_cases(Path(self._require(self.preprocessed_dataset_folder_base)), self.print_to_log_file)
        if self.fold == "all":
            everything = identifiers()
            return everything, everything
        path = Path(self.preprocessed_dataset_folder_base, splits.SPLITS_FILE)
        return splits.split_cases(
            path,
            int(self.fold),
            identifiers,
            folder,
            self.print_to_log_file,
            generate=_in_use("generate_crossval_split"),
        )

    def get_tr_and_val_datasets(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """Return the datasets of the training and of the validation cases."""
        cases = self.do_split()
        if self.is_cascaded:
            training_folders.require_previous_stage(
                self._require(self.folder_with_segs_from_previous_stage),
                [*cases[0], *cases[1]],
                self.configuration_manager.previous_stage_name,
            )
        training, validation = (
            self.dataset_class(
                self.preprocessed_dataset_folder,
                keys,
                folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
            )
            for keys in cases
        )
        return training, validation

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        """Return endless batches of training and validation data, whose workers are running already."""
        return start_augmenters(self, loader_class=_in_use("nnUNetDataLoader"), num_processes=get_allowed_n_proc_DA())

    # ---------------------------------------------------------------- training

    def run_training(self) -> None:
        """Train from the current epoch to the last one, or until a stop.

        Raises:
            RuntimeError: Another process trains this fold.
        """
        started = monotonic()
        with self._hold_output_folder() as holder:
            self._stop_conditions = StopConditions(
                Path(self._require(self.output_folder)),
                holder=holder,
                started=started,
                stop_after_s=self.training_options.stop_after_s,
                patience=self.training_options.early_stopping or 0,
            )
            try:
                self.on_train_start()
                # on_epoch_end moves on, and may skip epochs
                while self.current_epoch < self.num_epochs and not self._has_to_stop():
                    self._run_epoch()
                self.on_train_end()
            finally:
                self._progress.clear()
                self._shut_down_dataloaders()
                self._writer.wait()
                if self.local_rank == 0:
                    self._stop_conditions.forget_request()

    def _has_to_stop(self) -> bool:
        """Tell whether no further epoch shall begin, and log why; asked between two epochs, in all processes."""
        curve = self.logger.get_value("ema_fg_dice", step=None)
        reason = from_first_process(lambda: self._stop_conditions.reason(curve, now=monotonic()))
        self.stopped = reason or "" if self.current_epoch > 0 else ""  # one epoch, at least, makes a model
        if self.stopped:
            self.print_to_log_file(
                f"Ending after {self.current_epoch} of {self.num_epochs} epochs ({self.stopped}). The model is "
                "complete; --c goes on with the next epoch, on the same schedule of the learning rate"
            )
        return bool(self.stopped)

    def _run_epoch(self) -> None:
        seed_epoch(self.current_epoch, self.local_rank)
        self._progress.start_epoch()
        self.on_epoch_start()
        self.on_train_epoch_start()
        self.on_train_epoch_end(
            self._run_steps("training", self.train_step, self.dataloader_train, self.num_iterations_per_epoch)
        )
        with torch.no_grad():
            self.on_validation_epoch_start()
            self.on_validation_epoch_end(
                self._run_steps(
                    "validation", self.validation_step, self.dataloader_val, self.num_val_iterations_per_epoch
                )
            )
        self.on_epoch_end()
        self._progress.end_epoch()
        self._writer.raise_failure()

    def _run_steps(self, phase: str, step: Callable[[dict], dict], batches: Iterator[dict], number: int) -> list[dict]:
        """Take steps and return their outputs; a terminal shows the progress."""
        outputs: list[dict] = []
        known = self.logger.get_value("ema_fg_dice", step=None)
        for _ in self._progress.count(
            Position(self.current_epoch, self.num_epochs, phase, number),
            loss=lambda: latest_loss(outputs),
            dice=known[-1] if known else None,
        ):
            batch = next(batches)
            if self._has_to_draw_examples:
                self._has_to_draw_examples = False
                draw_first_batch(self, batch)
            outputs.append(step(batch))
        return fetch(outputs)

    def on_train_start(self) -> None:
        """Initialise, start the data loaders, write the model's files besides weights."""
        if not self.was_initialized:
            self.initialize()
        Path(self._require(self.output_folder)).mkdir(parents=True, exist_ok=True)
        self._prepare_dataset()  # before workers open its files
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.print_plans()
        empty_cache(self.device)
        self._save_model_description()
        self.plot_network_architecture()
        self._save_debug_information()

    def on_train_end(self) -> None:
        """Save the final checkpoint and stop the data loaders."""
        self.save_checkpoint_between_epochs(checkpoint_files.FINAL)
        if self.local_rank == 0:
            Path(self.output_folder, checkpoint_files.LATEST).unlink(missing_ok=True)
        self._shut_down_dataloaders()
        self.logger.local_logger.wait_for_plot()
        self._writer.wait()
        self._writer.raise_failure()
        empty_cache(self.device)
        self.print_to_log_file("Training done.")

    def on_epoch_start(self) -> None:
        """Note when the epoch began."""
        self.logger.log("epoch_start_timestamps", time(), self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        self.network.train()
        keep_frozen_statistics_(self.network)
        self.lr_scheduler.step(self.current_epoch)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {round(float(learning_rate), 5)}")
        self.logger.log("lrs", learning_rate, self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        """Learn from one batch `{'data', 'target', 'keys'}` and return its loss."""
        data, target = steps.move_batch(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(data, target)[1]
        steps.update_weights_(loss, self.network, self.optimizer, self.grad_scaler, self.max_gradient_norm)
        return {"loss": as_result(loss)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the mean training loss of the epoch, over all processes."""
        losses = gather(collate_outputs(train_outputs)["loss"])
        self.logger.log("train_losses", np.vstack(losses).mean(), self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        """Switch the network to evaluation."""
        self.network.eval()

    def validation_step(self, batch: dict) -> dict:
        """Return the loss and counts of one batch.

        True positives, false positives and false negatives per class.
        """
        data, target = steps.move_batch(batch, self.device)
        output: Any
        output, loss = self._forward(data, target)
        if self.enable_deep_supervision:
            output, target = output[0], target[0]
        tp, fp, fn = steps.count_hits(output, target, self.label_manager)
        return {"loss": as_result(loss), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log the mean validation loss and the Dice per class.

        Of all validation voxels of the epoch together.
        """
        collated = collate_outputs(val_outputs)
        counts = np.stack(
            [np.sum(collated[name], axis=0, dtype=np.float64) for name in ("tp_hard", "fp_hard", "fn_hard")]
        )
        dice = steps.dice_from_counts(*np.sum(gather(counts), axis=0))
        losses = gather(collated["loss"])
        self.logger.log("mean_fg_dice", steps.mean_of_known(dice), self.current_epoch)
        self.logger.log("dice_per_class_or_region", dice, self.current_epoch)
        self.logger.log("val_losses", np.vstack(losses).mean(), self.current_epoch)

    def on_epoch_end(self) -> None:
        """Report the epoch, save checkpoints, draw the curves, and move on to the next epoch."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        self._report_epoch()
        with self._writing_in_background():
            self._save_epoch_checkpoints(self.current_epoch)
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1

    def _forward(self, data: torch.Tensor, target: steps.TensorOrList) -> tuple[steps.TensorOrList, torch.Tensor]:
        """Return output and loss of a batch, in the precision of the device."""
        if self._keeps_float32 is None:
            self._keeps_float32 = self._has_to_keep_float32(data)
        with self._autocast():
            output = self.network(data)
            loss = self.loss(steps.as_loss_input(output), target)
        return output, loss if self._loss_weight == 1 else loss * self._loss_weight

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which network and loss are computed; it chooses their precision."""
        return contextlib.nullcontext() if self._keeps_float32 else autocast_context(self.device)

    def _has_to_keep_float32(self, data: torch.Tensor) -> bool:
        """Tell whether a CPU would compute wrong gradients in bfloat16, and log why."""
        if self.device.type != "cpu" or not wants_cpu_autocast():
            return False
        reason = describe_wrong_gradients(bare_network(self.network), data[:1])
        if reason:
            self.print_to_log_file(
                "Training in float32: in bfloat16 this processor computes wrong gradients for one of the network's "
                f"convolutions, {reason}"
            )
        return reason is not None

    def _report_epoch(self) -> None:
        def latest(key: str) -> Any:
            return self.logger.get_value(key, step=-1)

        duration = latest("epoch_end_timestamps") - latest("epoch_start_timestamps")
        self.print_to_log_file("train_loss", round(float(latest("train_losses")), 4))
        self.print_to_log_file("val_loss", round(float(latest("val_losses")), 4))
        self.print_to_log_file("Pseudo dice", [round(float(dice), 4) for dice in latest("dice_per_class_or_region")])
        self.print_to_log_file(f"Epoch time: {duration:.2f} s")

    # ---------------------------------------------------------------- checkpoints

    def _save_epoch_checkpoints(self, epoch: int) -> None:
        """Save checkpoint_best if the epoch was the best so far, and checkpoint_latest every `save_every` epochs."""
        self._save_checkpoint_if_best()
        # After the best, so that it knows how good that was.
        if (epoch + 1) % self.save_every == 0 and epoch != self.num_epochs - 1:
            self.save_checkpoint(self._in_output_folder(checkpoint_files.LATEST))

    def _save_checkpoint_if_best(self) -> None:
        ema = self.logger.get_value("ema_fg_dice", step=-1)
        if checkpoint_files.is_better(ema, self._best_ema):
            self._best_ema = ema
            self.print_to_log_file(f"New best EMA pseudo Dice: {round(float(ema), 4)}")
            self.save_checkpoint(self._in_output_folder(checkpoint_files.BEST))

    def save_latest_checkpoint(self) -> None:
        """Save checkpoint_latest between two epochs, after `on_epoch_end` has moved on."""
        self.save_checkpoint_between_epochs(checkpoint_files.LATEST)

    def save_checkpoint_between_epochs(self, name: str) -> None:
        """Save a checkpoint that goes on with `current_epoch`; `save_checkpoint` is for within an epoch."""
        self.current_epoch -= 1
        try:
            self.save_checkpoint(self._in_output_folder(name))
        finally:
            self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        """Save everything needed to go on with the next epoch, or to predict."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file(f"Checkpointing is disabled: {Path(filename).name} is not written")
            return
        state = self._snapshots.take(self._describe_state())
        self._writer.submit(filename, save_snapshot_file, state, filename)
        if not self._is_writing_in_background:
            self._writer.wait()
            self._writer.raise_failure()

    def _describe_state(self) -> dict[str, Any]:
        return describe_state(self)

    @contextlib.contextmanager
    def _writing_in_background(self) -> Iterator[None]:
        """Let `save_checkpoint` return before its file is written; a subclass that may look for it finds it there."""
        self._is_writing_in_background = all(
            vars(owner).get("leaves_checkpoint_files_alone", False)
            for owner in type(self).__mro__
            if any(hook in vars(owner) for hook in HOOKS_THAT_MAY_READ_CHECKPOINTS)
        )
        try:
            yield
        finally:
            self._is_writing_in_background = False

    def load_checkpoint(self, filename_or_checkpoint: dict | str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, given as its content or as a file."""
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = checkpoint_files.load_checkpoint_file(checkpoint, map_location=self.device)
        if not self.was_initialized:
            self.initialize()
        restore_state_(self, checkpoint)

    # ---------------------------------------------------------------- final validation

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict all validation cases as in inference, and write their segmentations and summary.json."""
        from nnunetv2.training.validation import validate

        validate(
            self,
            save_probabilities=save_probabilities,
            predictor_class=_in_use("nnUNetPredictor"),
            compute_metrics=_in_use("compute_metrics_on_folder"),
        )

    # ---------------------------------------------------------------- files and reports

    def print_to_log_file(self, *args: object, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Append a line to the log of the training, and print it.

        Only the first process writes the file.
        """
        now = datetime.fromtimestamp(time()) if add_timestamp and self.local_rank == 0 else None
        line = log_files.format_log_line(args, now)
        if self.local_rank == 0 and self.log_file is not None:
            log_files.append_to_log(Path(self.log_file), line, header=log_files.CITATION)
        if also_print_to_console:
            self._progress.clear()
            show(*line.split("\n"), flush=True)

    def print_plans(self) -> None:
        """Log the configuration and the rest of the plans."""
        if self.local_rank == 0:
            training_folders.log_plans(
                self.print_to_log_file, self.plans_manager.plans, self.configuration_name, self.configuration_manager
            )

    def plot_network_architecture(self) -> None:
        """Draw the network.

        Does nothing here, a hook for trainers that bring a tool for it.
        """

    def _save_debug_information(self) -> None:
        """Write debug.json: the attributes of this trainer and the machine, as text."""
        if self.local_rank == 0:
            save_json_atomically(describe_trainer(self), self._in_output_folder("debug.json"))

    def _save_model_description(self) -> None:
        """Write plans, dataset description and fingerprint beside the folds; the other processes wait for it."""
        if self.local_rank == 0:
            save_model_description(
                self.output_folder_base,
                self.plans_manager.plans,
                self.dataset_json,
                self.preprocessed_dataset_folder_base,
            )
        wait_for_all()

    def _prepare_dataset(self) -> None:
        """Let the dataset class prepare its files for fast reading, and see to it that there are splits.

        The other processes wait for it.
        """
        if self.local_rank == 0:
            self.dataset_class.unpack_dataset(
                self.preprocessed_dataset_folder,
                overwrite_existing=False,
                num_processes=max(1, get_allowed_n_proc_DA() // 2),
                verify=True,
            )
            if self.is_ddp:
                self.do_split()
        wait_for_all()

    def _hold_output_folder(self) -> contextlib.AbstractContextManager[str]:
        """Hold the folder in the first process; the value is the name of the holder."""
        if self.local_rank != 0:
            return contextlib.nullcontext("")
        return training_in(self._require(self.output_folder), refuses_to_stop=self.refused_options.get("stop", ""))

    def _shut_down_dataloaders(self) -> None:
        stop_augmenters(self.dataloader_train, self.dataloader_val)

    def _in_output_folder(self, name: str) -> str:
        return os.path.join(self._require(self.output_folder), name)

    def _require(self, folder: str | None) -> str:
        return training_folders.require_folder(folder, type(self).__name__)


def _in_use(name: str) -> Any:
    """Return a class or function by its name in this module, where programs put one of their own in its place."""
    return getattr(sys.modules[__name__], name)
