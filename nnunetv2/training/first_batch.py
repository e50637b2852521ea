"""Show the first batch of a training as a picture.

Wrong data is seen at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

logger = logging.getLogger(__name__)

PICTURE = "augmentation_examples.png"
MAX_SAMPLES = 6


def draw_first_batch(trainer: nnUNetTrainer, batch: dict) -> None:
    """Draw samples of a batch beside the log, in the background.

    A failure is logged and does no harm.
    """
    try:
        samples = _copy_samples(batch)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # somebody's loader
        logger.warning("no %s: batches are unlike those of nnU-Net's data loader: %r", PICTURE, error)
        return
    trainer._writer.submit(
        PICTURE,
        _draw,
        Path(trainer.output_folder, PICTURE),
        samples,
        trainer.configuration_manager.spacing,
        trainer.dataset_json["labels"],
        trainer.label_manager.has_regions,
        is_vital=False,
    )


def _draw(path: Path, batch: dict, spacing: list[float], labels: dict[str, Any], has_regions: bool) -> None:
    from nnunetv2.training.data_augmentation.example_picture import save_augmentation_examples

    save_augmentation_examples(
        path, [batch], max_samples=MAX_SAMPLES, spacing=spacing, names=_names(labels, has_regions)
    )


def _copy_samples(batch: dict) -> dict[str, Any]:
    """Copy the samples to draw; the training may change the batch meanwhile."""
    target = batch["target"][0] if isinstance(batch["target"], (list, tuple)) else batch["target"]
    return {
        "data": torch.as_tensor(batch["data"])[:MAX_SAMPLES].cpu().clone().numpy(),
        "target": torch.as_tensor(target)[:MAX_SAMPLES].cpu().clone().numpy(),
        "keys": [str(key) for key in batch.get("keys", range(MAX_SAMPLES))],
    }


def _names(labels: dict[str, Any], has_regions: bool) -> dict[int, str]:
    """Return the names of labels, or of regions by their number."""
    if has_regions:
        regions = [name for name in labels if name not in ("background", "ignore")]
        return dict(enumerate([*regions, "ignore"]))
    return {int(value[0] if isinstance(value, (list, tuple)) else value): name for name, value in labels.items()}
