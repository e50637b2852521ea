"""Write model folders with small random networks, as a training would leave them behind."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_LESSON_SIDE = 24
LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class TinyModel:
    """The differences between models."""

    patch_size: Sequence[int] = (16, 12, 20)
    spacing: Sequence[float] = (2.0, 1.0, 1.0)
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "one": 1, "two": 2})
    regions_class_order: Sequence[int] | None = None
    channels: Sequence[str] = ("MRI",)
    file_ending: str = ".nii.gz"
    reader: str = "SimpleITKIO"
    transpose_forward: Sequence[int] = (0, 1, 2)
    features: Sequence[int] = (4, 8)
    folds: Sequence[int | str] = (0,)
    mirroring_axes: Sequence[int] | None = (0, 1, 2)
    trainer: str = "nnUNetTrainer"
    seed: int = 0
    probabilities: tuple[str, dict[str, Any]] = ("resample_data_or_seg_to_shape", LINEAR)
    previous_stage: str | None = None
    normalization: str | None = None
    """Default: that of colours for png files, else z-scores."""
    lessons: int = 0
    """Steps of training on telling intensities apart, after which logits are decisive instead of nearly equal."""

    @property
    def configuration_name(self) -> str:
        return "2d" if len(self.patch_size) == 2 else "3d_fullres"

    def dataset_json(self) -> dict[str, Any]:
        content = {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": self.labels,
            "numTraining": 5,
            "file_ending": self.file_ending,
        }
        if self.regions_class_order is not None:
            content["regions_class_order"] = list(self.regions_class_order)
        return content

    def plans(self) -> dict[str, Any]:
        backward = [list(self.transpose_forward).index(axis) for axis in range(3)]
        statistics = {
            "max": 3000.0,
            "mean": 300.0,
            "median": 280.0,
            "min": 0.0,
            "percentile_00_5": 5.0,
            "percentile_99_5": 2500.0,
            "std": 200.0,
        }
        return {
            "dataset_name": "Dataset998_Tiny",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "original_median_shape_after_transp": [30, 40, 50],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": backward,
            "configurations": self._configurations(),
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(i): statistics for i in range(len(self.channels))},
        }

    def _configurations(self) -> dict[str, Any]:
        configuration = self._configuration()
        if self.previous_stage is None:
            return {self.configuration_name: configuration}
        return {
            self.configuration_name: {**configuration, "previous_stage": self.previous_stage},
            self.previous_stage: configuration,
        }

    def _configuration(self) -> dict[str, Any]:
        resampling, resampling_options = self.probabilities
        default = "RGBTo01Normalization" if self.file_ending == ".png" else "ZScoreNormalization"
        return {
            "data_identifier": f"nnUNetPlans_{self.configuration_name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": list(self.patch_size),
            "median_image_size_in_voxels": [30.0, 40.0, 50.0][: len(self.patch_size)],
            "spacing": list(self.spacing),
            "normalization_schemes": [self.normalization or default] * len(self.channels),
            "use_mask_for_norm": [False] * len(self.channels),
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {**LINEAR, "order": 3},
            "resampling_fn_seg_kwargs": {**LINEAR, "is_seg": True},
            "resampling_fn_probabilities": resampling,
            "resampling_fn_probabilities_kwargs": resampling_options,
            "architecture": self.architecture(),
            "batch_dice": False,
        }

    def architecture(self) -> dict[str, Any]:
        dim, stages = len(self.patch_size), len(self.features)
        return {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": list(self.features),
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim] * stages,
                "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
                "n_conv_per_stage": [1] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }


def write_model(folder: Path, model: TinyModel | None = None, **changes: Any) -> Path:
    """Write plans.json, dataset.json and a checkpoint per fold; `changes` go to TinyModel."""
    from nnunetv2.models.model_folder import build_network
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    model = model or TinyModel(**changes)
    plans, dataset_json = model.plans(), model.dataset_json()
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    manager = PlansManager(plans)
    for number, fold in enumerate(model.folds):
        torch.manual_seed(model.seed + number)
        network = build_network(
            nnUNetTrainer, manager, manager.get_configuration(model.configuration_name), dataset_json
        )
        _teach_intensities(network, model)
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": OrderedDict(network.state_dict()),
                "optimizer_state": {},
                "grad_scaler_state": None,
                "logging": {},
                "_best_ema": None,
                "current_epoch": 1,
                "init_args": {
                    "plans": plans,
                    "configuration": model.configuration_name,
                    "fold": fold,
                    "dataset_json": dataset_json,
                    "device": torch.device("cpu"),
                },
                "trainer_name": model.trainer,
                "inference_allowed_mirroring_axes": None
                if model.mirroring_axes is None
                else tuple(model.mirroring_axes),
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def _teach_intensities(network: torch.nn.Module, model: TinyModel) -> None:
    """Train a network to sort the voxels of smooth noise into as many intensity classes as it has outputs."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    channels = next(network.parameters()).shape[1]  # in cascades there are more than the image has
    blur = torch.nn.functional.avg_pool2d if len(model.patch_size) == 2 else torch.nn.functional.avg_pool3d
    for _ in range(model.lessons):
        sides = [min(side, _LESSON_SIDE) for side in model.patch_size]  # the network takes any
        image = blur(torch.randn(2, channels, *sides), 5, stride=1, padding=2)
        image = (image - image.mean()) / image.std()
        if model.file_ending == ".png":
            image = (image * 0.25 + 0.5).clamp(0, 1)
        answer = network(image)
        intensity = image.mean(dim=1)
        cuts = torch.quantile(intensity.flatten()[:10000], torch.linspace(0, 1, answer.shape[1] + 1)[1:-1])
        loss = torch.nn.functional.cross_entropy(answer, torch.bucketize(intensity, cuts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
