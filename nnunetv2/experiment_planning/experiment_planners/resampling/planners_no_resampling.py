"""Plan for data that stay as they are, whatever their spacing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)


class nnUNetPlannerResEncL_noResampling(nnUNetPlannerResEncL):
    """Do not resample. A 3d_lowres that is planned nonetheless has the data of 3d_fullres."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetLPlans_noResampling",
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

    def generate_data_identifier(self, configuration_name: str) -> str:
        return ExperimentPlanner.generate_data_identifier(self, configuration_name)

    def determine_resampling(self, *args: Any, **kwargs: Any) -> tuple[Any, dict, Any, dict]:
        from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack

        return no_resampling_hack, {}, no_resampling_hack, {}

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack

        return no_resampling_hack, {}
