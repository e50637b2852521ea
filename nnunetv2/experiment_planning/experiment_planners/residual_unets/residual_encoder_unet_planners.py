"""Presets of residual encoder U-Nets for three sizes of GPU.

About 10 (M), 24 (L) and 40 GB (XL) of memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner


class _ResEncPreset(ResEncUNetPlanner):
    """Base of the presets, each for an intended size of memory.

    The batch may hold the whole dataset.
    """

    intended_memory_in_gb: float
    reference_values: tuple[int, int]
    """Values in feature maps known to fit that memory, in 3d and 2d."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float,
        preprocessor_name: str,
        plans_name: str,
        overwrite_target_spacing: Sequence[float] | None,
        suppress_transpose: bool,
    ) -> None:
        if gpu_memory_target_in_gb != self.intended_memory_in_gb:
            warnings.warn(
                f"{type(self).__name__} is meant for {self.intended_memory_in_gb} GB of GPU memory; with a "
                f"target of {gpu_memory_target_in_gb} GB its results no longer compare with others'. Give "
                f"these plans a name of their own (-overwrite_plans_name).",
                stacklevel=3,
            )
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.UNet_reference_val_3d, self.UNet_reference_val_2d = self.reference_values
        self.UNet_reference_val_corresp_GB = self.intended_memory_in_gb
        self.max_dataset_covered = 1


class nnUNetPlannerResEncM(_ResEncPreset):
    intended_memory_in_gb = 8
    reference_values = 680000000, 135000000

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetMPlans",
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


class nnUNetPlannerResEncL(_ResEncPreset):
    intended_memory_in_gb = 24
    reference_values = 2100000000, 380000000

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetLPlans",
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


class nnUNetPlannerResEncXL(_ResEncPreset):
    intended_memory_in_gb = 40
    reference_values = 3600000000, 560000000

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 40,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetXLPlans",
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
