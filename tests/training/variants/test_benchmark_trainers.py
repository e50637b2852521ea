"""Trainers that measure a machine; here on the CPU, while torch claims to have a GPU."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from tiny_dataset import make_dataset_json, make_plans

from nnunetv2.training.nnUNetTrainer.variants.benchmarking.nnUNetTrainerBenchmark_5epochs import (
    nnUNetTrainerBenchmark_5epochs,
)
from nnunetv2.training.nnUNetTrainer.variants.benchmarking.nnUNetTrainerBenchmark_5epochs_noDataLoading import (
    nnUNetTrainerBenchmark_5epochs_noDataLoading,
)

CPU = torch.device("cpu")


def make(trainer_class, plans, **labels):
    trainer = trainer_class(plans, "3d_fullres", 0, make_dataset_json(**labels), CPU)
    trainer.num_epochs = 2
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    return trainer


def results_of(trainer):
    return json.loads(Path(trainer.output_folder, "benchmark_result.json").read_text())


@pytest.mark.usefixtures("cuda_on_paper")
@pytest.mark.parametrize(
    "trainer_class", [nnUNetTrainerBenchmark_5epochs, nnUNetTrainerBenchmark_5epochs_noDataLoading]
)
def test_the_fastest_epoch_is_written_beside_results_of_other_machines(plans, trainer_class):
    trainer = make(trainer_class, plans)
    Path(trainer.output_folder, "benchmark_result.json").write_text('{"other": {"fastest_epoch": 1.0}}')
    trainer.run_training()
    trainer.perform_actual_validation()
    key = f"{socket.gethostname()}__90000__{torch.__version__}__PaperGPU1__num_gpus_1"
    results = results_of(trainer)
    assert set(results) == {"other", key}
    assert set(results[key]) == {"torch_version", "cudnn_version", "gpu_name", "fastest_epoch", "num_gpus", "hostname"}
    assert 0 < results[key]["fastest_epoch"] < 60
    assert not list(Path(trainer.output_folder).rglob("*.pth"))


@pytest.mark.usefixtures("cuda_on_paper")
def test_a_crash_is_a_result(plans):
    trainer = make(nnUNetTrainerBenchmark_5epochs, plans)

    def fail(batch):
        raise RuntimeError("CUDA out of memory")

    trainer.train_step = fail
    trainer.run_training()
    (result,) = results_of(trainer).values()
    assert trainer.crashed_with_runtime_error and "memory" in result["fastest_epoch"]
    assert "CUDA out of memory" in Path(trainer.log_file).read_text()


def test_a_benchmark_needs_a_gpu_and_fold_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="GPU"):
        make(nnUNetTrainerBenchmark_5epochs, make_plans())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="fold 0 only"):
        nnUNetTrainerBenchmark_5epochs(make_plans(), "3d_fullres", 1, make_dataset_json(), CPU)


@pytest.mark.usefixtures("cuda_on_paper")
def test_the_random_batch_looks_like_a_real_one(plans):
    trainer = make(nnUNetTrainerBenchmark_5epochs_noDataLoading, plans)
    batch = trainer.dummy_batch
    assert trainer.get_dataloaders() == (None, None)
    assert tuple(batch["data"].shape) == (2, 1, 16, 12, 20)
    assert [tuple(target.shape) for target in batch["target"]] == [(2, 1, 16, 12, 20), (2, 1, 8, 6, 10)]
    assert batch["target"][0].min() >= 0 and batch["target"][0].max() == 2
    regions = make(
        nnUNetTrainerBenchmark_5epochs_noDataLoading,
        plans,
        regions_class_order=[1, 2],
        labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    )
    assert regions.dummy_batch["target"][0].shape[1] == 3 and regions.dummy_batch["target"][0].dtype == torch.bool


@pytest.mark.usefixtures("cuda_on_paper")
def test_without_deep_supervision_there_is_no_random_batch():
    class Single(nnUNetTrainerBenchmark_5epochs_noDataLoading):
        def _get_deep_supervision_scales(self):
            return None

    with pytest.raises(NotImplementedError, match="deep supervision"):
        make(Single, make_plans())
