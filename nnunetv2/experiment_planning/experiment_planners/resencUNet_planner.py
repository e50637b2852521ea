"""Plan for U-Nets with a residual encoder."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, signature

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.vram_proxy import RESIDUAL_ENCODER_UNET

SHARED_CONFIGURATIONS = ("2d", "3d_fullres")


class ResEncUNetPlanner(ExperimentPlanner):
    """Plan a ResidualEncoderUNet.

    Many blocks at low resolution, a light decoder, the memory of the default network.

    2d and 3d_fullres share their preprocessed data with the default plans, since both make the same, as long as the
    plans keep their usual name.
    """

    encoder_depth_argument = "n_blocks_per_stage"

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetResEncUNetPlans",
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
        self.UNet_class = RESIDUAL_ENCODER_UNET
        self.UNet_reference_val_3d, self.UNet_reference_val_2d = 680000000, 135000000
        self.UNet_blocks_per_stage_encoder = (1, 3, 4) + (6,) * 10
        self.UNet_blocks_per_stage_decoder = (1,) * 12

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Share the folders of the default plans.

        Unless the plans were given a name of their own.

        A name of their own means that something was changed, and preprocessing must not replace the standard data.
        """
        if configuration_name in SHARED_CONFIGURATIONS and self.plans_identifier == usual_plans_name(type(self)):
            return f"nnUNetPlans_{configuration_name}"
        return super().generate_data_identifier(configuration_name)

    def exceeds_memory(self, estimate: float, reference: float, reference_batch_size: int) -> bool:
        return estimate > reference


def usual_plans_name(planner_class: type[ExperimentPlanner]) -> str | None:
    """Return the default of `plans_name` in a planner's constructor.

    Or in that of the nearest ancestor that has one.
    """
    for cls in planner_class.__mro__:
        parameter = signature(vars(cls).get("__init__", object)).parameters.get("plans_name")
        if parameter is not None and parameter.default is not Parameter.empty:
            return parameter.default
    return None
