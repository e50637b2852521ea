"""Plan for U-Nets with a residual encoder."""
from __future__ import annotations

from collections.abc import Sequence

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner


class ResEncUNetPlanner(ExperimentPlanner):
    """Plan a ResidualEncoderUNet: many blocks at low resolution, a light decoder, the memory of the default network.

    2d and 3d_fullres share their preprocessed data with the default plans, since both make the same.
    """

    encoder_depth_argument = "n_blocks_per_stage"

    def __init__(self, dataset_name_or_id: str | int, gpu_memory_target_in_gb: float = 8,
                 preprocessor_name: str = "DefaultPreprocessor", plans_name: str = "nnUNetResEncUNetPlans",
                 overwrite_target_spacing: Sequence[float] | None = None, suppress_transpose: bool = False) -> None:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name,
                         overwrite_target_spacing, suppress_transpose)
        self.UNet_class = ResidualEncoderUNet
        self.UNet_reference_val_3d, self.UNet_reference_val_2d = 680000000, 135000000
        self.UNet_blocks_per_stage_encoder = (1, 3, 4) + (6,) * 10
        self.UNet_blocks_per_stage_decoder = (1,) * 12

    def generate_data_identifier(self, configuration_name: str) -> str:
        if configuration_name in ("2d", "3d_fullres"):
            return f"nnUNetPlans_{configuration_name}"
        return super().generate_data_identifier(configuration_name)

    def exceeds_memory(self, estimate: float, reference: float, reference_batch_size: int) -> bool:
        return estimate > reference
