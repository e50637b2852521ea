"""A trainer that measures how fast a GPU trains when it never waits for data."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from nnunetv2.plans.plans_manager import determine_num_input_channels
from nnunetv2.training.nnUNetTrainer.variants.benchmarking.nnUNetTrainerBenchmark_5epochs import (
    nnUNetTrainerBenchmark_5epochs,
)


class nnUNetTrainerBenchmark_5epochs_noDataLoading(nnUNetTrainerBenchmark_5epochs):
    """Train for 5 epochs with one random batch (`dummy_batch`), which stays on the device."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._set_batch_size_and_oversample()
        self.dummy_batch = self._draw_batch()

    def get_dataloaders(self) -> tuple[None, None]:
        """Load nothing."""
        return None, None

    def on_train_start(self) -> None:
        """Prepare as ever, then offer the same batch again and again."""
        super().on_train_start()
        self.dataloader_train = self.dataloader_val = itertools.repeat(self.dummy_batch)

    def _draw_batch(self) -> dict[str, Any]:
        scales = self._get_deep_supervision_scales()
        if scales is None:
            raise NotImplementedError("this benchmark is made for trainers with deep supervision")
        patch_size = self.configuration_manager.patch_size
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        data = torch.rand((self.batch_size, channels, *patch_size), device=self.device)
        shapes = [[int(length * share) for length, share in zip(patch_size, scale)] for scale in scales]
        return {
            "data": data,
            "target": [self._draw_target(shape) for shape in shapes],
            "keys": ["random"] * self.batch_size,
        }

    def _draw_target(self, shape: list[int]) -> torch.Tensor:
        labels = self.label_manager
        if labels.has_regions:
            channels = labels.num_segmentation_heads + labels.has_ignore_label
            return torch.rand((self.batch_size, channels, *shape), device=self.device) < 0.5
        uniform = torch.rand((self.batch_size, 1, *shape), device=self.device)
        return (uniform * max(labels.all_labels)).round().to(torch.int16)
