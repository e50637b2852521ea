"""Plan for resampling with torch: linear, faster than splines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

_NEVER_SEPARATE_Z = {"force_separate_z": False, "memefficient_seg_resampling": False}
_SEPARATE_Z_IF_ANISOTROPIC = {
    "force_separate_z": None,
    "memefficient_seg_resampling": False,
    "separate_z_anisotropy_threshold": 3,
}


class _TorchResampling(ExperimentPlanner):
    """Mix-in: resample with torch, and keep the data apart from those of the default plans."""

    resampling_arguments = _NEVER_SEPARATE_Z

    def generate_data_identifier(self, configuration_name: str) -> str:
        return ExperimentPlanner.generate_data_identifier(self, configuration_name)

    def determine_resampling(self, *args: Any, **kwargs: Any) -> tuple[Any, dict, Any, dict]:
        from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

        return (
            resample_torch_fornnunet,
            {"is_seg": False, **self.resampling_arguments},
            resample_torch_fornnunet,
            {"is_seg": True, **self.resampling_arguments},
        )

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

        return resample_torch_fornnunet, {"is_seg": False, **self.resampling_arguments}


class nnUNetPlannerResEncL_torchres(_TorchResampling, nnUNetPlannerResEncL):
    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetLPlans_torchres",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )


class nnUNetPlannerResEncL_torchres_sepz(_TorchResampling, nnUNetPlannerResEncL):
    resampling_arguments = _SEPARATE_Z_IF_ANISOTROPIC

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetLPlans_torchres_sepz",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )


class nnUNetPlanner_torchres(_TorchResampling, ExperimentPlanner):
    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetPlans_torchres",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
