"""A tiny dataset that all tests of a module share, and stand-ins for what the machine may lack."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from importable_torchvision import make_torchvision_importable
from tiny_dataset import make_tiny_dataset


@pytest.fixture(scope="module")
def shared_roots(tmp_path_factory):
    """Folders of nnU-Net with one preprocessed dataset; results are of a test's own (see `plans`)."""
    folder = tmp_path_factory.mktemp("shared")
    return folder, make_tiny_dataset(folder, stages=3, cases=5)


@pytest.fixture
def plans(shared_roots, tmp_path, monkeypatch) -> dict:
    """Plans of the shared dataset, ready for training in this process alone."""
    folder, plans = shared_roots
    monkeypatch.setenv("nnUNet_preprocessed", str(folder))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    # Drawing takes longer than training here, and is tested elsewhere.
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)
    return plans


@pytest.fixture
def cuda_on_paper(monkeypatch):
    """Let torch say that there is a GPU; trainers are still given the CPU as device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Paper GPU 1")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    # The optimizers of a build with CUDA ask the GPU what it is doing.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture
def adan(monkeypatch):
    """A stand-in for the package adan-pytorch with the same constructor."""

    class Adan(torch.optim.AdamW):
        def __init__(self, params, lr=1e-3, betas=(0.02, 0.08, 0.01), eps=1e-8, weight_decay=0):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    monkeypatch.setitem(sys.modules, "adan_pytorch", SimpleNamespace(Adan=Adan))
    return Adan


@pytest.fixture
def small_primus(monkeypatch):
    """Build every Primus network with a width and depth that train in a moment."""
    make_torchvision_importable()
    from dynamic_network_architectures.architectures import primus

    from nnunetv2.training.nnUNetTrainer.primus import primus_trainers

    small = {"embed_dim": 66, "eva_depth": 1, "eva_numheads": 1}
    for size in "SBML":
        monkeypatch.setitem(primus._PRIMUS_CONFIGS, size, small)
    embedding = primus.PatchEmbedDeeperControlled
    monkeypatch.setattr(
        primus, "PatchEmbedDeeperControlled", lambda **options: embedding(**{**options, "ch_per_level": (4, 4, 8, 8)})
    )
    find_primus = primus_trainers.find_primus
    monkeypatch.setattr(
        primus_trainers,
        "find_primus",
        lambda name: lambda **options: find_primus(name)(**{**options, **(small if name == "Primus" else {})}),
    )
