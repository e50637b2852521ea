"""Sites with a few phantom scans and small plans, which plan, train and predict with real commands in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from demo.phantoms import Scanner, write_dataset
from nnunetv2.federated.commands.simulate import LocalSite

SCANNERS = {
    "north": Scanner(spacing_mm=(2.5, 2.5, 2.5), intensities=(300, 520, 760), noise=0.2, bias=0.1),
    "south": Scanner(spacing_mm=(3.0, 2.0, 2.0), intensities=(60, 95, 130), noise=0.3, bias=0.05),
    "west": Scanner(spacing_mm=(2.0, 3.0, 2.5), intensities=(200, 240, 400), noise=0.2, bias=0.1),
}
CONFIGURATION = "3d_fullres"


def make_sites(
    folder: Path,
    *,
    num_sites: int = 2,
    num_train: int = 5,
    num_test: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[LocalSite]:
    """Write one small dataset per site, each below roots of its own."""
    sites = []
    for number, (name, scanner) in enumerate(list(SCANNERS.items())[:num_sites]):
        roots = {root: str(folder / name / root) for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        site = LocalSite(
            name=name,
            dataset=str(601 + number),
            credential=folder / name / "site.json",
            environment={**roots, "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        write_dataset(
            Path(roots["nnUNet_raw"]) / f"Dataset{site.dataset}_Phantom",
            scanner,
            num_train=num_train,
            num_test=num_test,
            seed=number,
        )
        sites.append(site)
    return sites


def shrink_plans(site: LocalSite, *, features: int = 4) -> None:
    """Make the network of a site's plans a small one."""
    path = Path(site.environment["nnUNet_preprocessed"]) / f"Dataset{site.dataset}_Phantom" / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = 2
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [features * 2**stage for stage in range(network["n_stages"])]
    path.write_text(json.dumps(plans))


def plan_command(site: LocalSite, mode: str = "ffe") -> list[str]:
    """Return the command with which a site plans and preprocesses."""
    return [
        "nnUNetv2_plan_and_preprocess",
        "-d",
        site.dataset,
        "--federated",
        mode,
        "-c",
        CONFIGURATION,
        "-np",
        "1",
        "-npfp",
        "1",
    ]


def train_command(site: LocalSite, *options: str, trainer: str = "nnUNetTrainerAsymFedAvg") -> list[str]:
    """Return the command with which a site trains."""
    return ["nnUNetv2_train", site.dataset, CONFIGURATION, "0", "-tr", trainer, "-device", "cpu", *options]


def final_weights(
    site: LocalSite, trainer: str = "nnUNetTrainerAsymFedAvg", num_epochs: tuple[int, ...] = (2, 4)
) -> dict[str, np.ndarray]:
    """Return the weights that a site's training ended with."""
    import torch

    folder = Path(site.environment["nnUNet_results"]) / f"Dataset{site.dataset}_Phantom"
    path = folder / f"{trainer}__nnUNetPlans__{CONFIGURATION}" / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    assert content["current_epoch"] in num_epochs
    return {name: tensor.numpy() for name, tensor in content["network_weights"].items()}
