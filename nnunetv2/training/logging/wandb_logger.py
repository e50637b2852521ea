"""Send the figures of a training to Weights & Biases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.training.logging.cluster_job import get_cluster_job_id


class WandbLogger:
    """One run of Weights & Biases, which goes on when the training does.

    `nnUNet_wandb_project` (default nnunet) and `nnUNet_wandb_mode` (default online) say where to.
    """

    def __init__(self, output_folder: str | os.PathLike, resume: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("nnUNet_wandb_enabled is set, but wandb is missing: pip install wandb") from error
        if output_folder is None:
            raise RuntimeError("logging to Weights & Biases needs an output folder: set nnUNet_results")
        self.output_folder = Path(output_folder)
        self.resume = resume
        self.run = wandb.init(
            project=os.environ.get("nnUNet_wandb_project", "nnunet"),
            mode=os.environ.get("nnUNet_wandb_mode", "online"),
            dir=str(self.output_folder),
            id=self._find_run(),
            resume="allow" if resume else "never",
        )
        self.update_config({"JobID": get_cluster_job_id()})

    def _find_run(self) -> str | None:
        """Return the name of the run to go on with; files of a run that is started anew are deleted."""
        folder = self.output_folder / "wandb"
        if not folder.exists():
            return None
        if not self.resume:
            shutil.rmtree(folder)
            return None
        # The latest run's file is called run-<id>.wandb.
        files = sorted((folder / "latest-run").glob("run-*.wandb"))
        return files[0].stem[len("run-") :] if files else None

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Add settings to those of the run."""
        self.run.config.update(dict(config), allow_val_change=True)

    def log(self, key: str, value: Any, step: int) -> None:
        """Send the value of an epoch.

        Unless the run to go on with is further already.
        """
        self.run.summary["current_epoch"] = step
        if self.resume and step < self.run.step:
            return
        self.run.log({key: value}, step=step)

    def log_summary(self, key: str, value: Any) -> None:
        """Set a figure of the whole run."""
        self.run.summary[key] = value
