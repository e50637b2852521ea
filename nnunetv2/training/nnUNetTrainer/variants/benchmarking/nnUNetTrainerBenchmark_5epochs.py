"""A trainer that measures how fast a machine trains."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import read_json

RESULT_FILE = "benchmark_result.json"


class nnUNetTrainerBenchmark_5epochs(nnUNetTrainer):
    """Train for 5 epochs and write the fastest one's duration to benchmark_result.json.

    No checkpoint is saved.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.fold == 0, f"a benchmark is run with fold 0 only, got fold {self.fold}"
        assert torch.cuda.is_available(), "a benchmark needs a GPU that CUDA can use"
        self.disable_checkpointing = True
        self.num_epochs = 5
        self.crashed_with_runtime_error = False

    def save_checkpoint(self, filename: str) -> None:
        """Do nothing."""

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing."""

    def run_training(self) -> None:
        """Train; running out of memory, or another RuntimeError, is the result of the benchmark then."""
        try:
            super().run_training()
        except RuntimeError as error:
            self.crashed_with_runtime_error = True
            self.on_train_end()
            self.print_to_log_file(f"The benchmark ended with an error: {error}")

    def on_train_end(self) -> None:
        """Add the result of this machine to those in the file."""
        super().on_train_end()
        if self.local_rank != 0:
            return
        path = Path(self.output_folder, RESULT_FILE)
        results = read_json(path) if path.is_file() else {}
        result = self._describe_result()
        results[_key_of(result)] = result
        save_json_atomically(results, path)

    def _describe_result(self) -> dict[str, object]:
        return {
            "torch_version": torch.__version__,
            "cudnn_version": torch.backends.cudnn.version(),
            "gpu_name": torch.cuda.get_device_name(),
            "fastest_epoch": self._fastest_epoch(),
            "num_gpus": distributed.get_world_size() if self.is_ddp else 1,
            "hostname": socket.gethostname(),
        }

    def _fastest_epoch(self) -> float | str:
        """Return the duration of the fastest epoch in seconds, or a text if there is none."""
        if self.crashed_with_runtime_error:
            return "The training ended with a RuntimeError, maybe for want of GPU memory"
        starts = self.logger.get_value("epoch_start_timestamps", step=None)
        ends = self.logger.get_value("epoch_end_timestamps", step=None)
        return min(end - start for start, end in zip(starts, ends))


def _key_of(result: dict[str, object]) -> str:
    gpu = str(result["gpu_name"]).replace(" ", "")
    return (
        f"{result['hostname']}__{result['cudnn_version']}__{result['torch_version']}__{gpu}"
        f"__num_gpus_{result['num_gpus']}"
    )
