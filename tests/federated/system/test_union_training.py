"""Sites that annotate different classes, with real commands: killed or not, masked or not, all predict all classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from running_sites import Coordinator, train_to_the_end
from small_sites import CONFIGURATION, final_weights, make_sites, plan_command, shrink_plans, train_command
from union_sites import annotate

from nnunetv2.federated.commands.simulate import run_everywhere, running_coordinator
from nnunetv2.federated.coordinator.storage.store import Store

RUN = f"{CONFIGURATION}.fold_0.nnUNetTrainerAsymFedAvg"
CLASSES = {"north": {"organ": 1}, "south": {"lesion": 1, "organ": 2}, "west": {"lesion": 1, "organ": 2}}
UNION = {"background": 0, "lesion": 1, "organ": 2}
OPTIONS = ["--labels", "union", "--iterations", "2", "--val-iterations", "1", "--validate-every", "1"]


def make_union_sites(folder: Path):
    sites = make_sites(folder, num_sites=3, environment={"nnUNet_seed": "7", "nnUNet_cpu_autocast": "0"})
    for site in sites:
        raw = Path(site.environment["nnUNet_raw"]) / f"Dataset{site.dataset}_Phantom"
        annotate(raw, CLASSES[site.name])
    return sites


def plan(sites, logs: Path) -> None:
    run_everywhere(sites, plan_command, step="plan", log_folder=logs)
    for site in sites:
        shrink_plans(site)


def model_folder(site) -> Path:
    folder = Path(site.environment["nnUNet_results"]) / f"Dataset{site.dataset}_Phantom"
    return folder / f"nnUNetTrainerAsymFedAvg__nnUNetPlans__{CONFIGURATION}"


def test_killed_coordinator_and_killed_site_end_with_the_bits_of_an_undisturbed_run(tmp_path):
    options = [*OPTIONS, "--epochs", "4"]
    weights = {}
    for name in ("undisturbed", "killed"):
        sites, logs = make_union_sites(tmp_path / name), tmp_path / name / "logs"
        folder = tmp_path / name / "coordinator"
        with running_coordinator(folder, sites, options):
            plan(sites, logs)
        coordinator = Coordinator(folder, sites, options, logs)
        train_to_the_end(coordinator, sites, logs, is_killed=name == "killed", kills=0)
        weights[name] = [final_weights(site) for site in sites]
    first, *others = [*weights["undisturbed"], *weights["killed"]]
    for other in others:
        for tensor, values in first.items():
            np.testing.assert_array_equal(values, other[tensor], err_msg=tensor)

    for site in sites:
        described = json.loads((model_folder(site) / "dataset.json").read_text())
        assert described["labels"] == UNION
        assert described["annotated_labels"] == ["background", *CLASSES[site.name]]
        summary = json.loads((model_folder(site) / "fold_0" / "validation" / "summary.json").read_text())
        assert [*summary["mean"]] == [str(UNION[name]) for name in sorted(CLASSES[site.name])]
    common = folder / "models" / model_folder(sites[0]).name
    assert json.loads((common / "dataset.json").read_text())["labels"] == UNION
    predict(sites[0], common, tmp_path / "predicted", logs)
    found = {int(v) for file in (tmp_path / "predicted").glob("*.nii.gz") for v in np.unique(read(file))}
    assert found <= {0, 1, 2}


def predict(site, model: Path, output: Path, logs: Path) -> None:
    images = Path(site.environment["nnUNet_raw"]) / f"Dataset{site.dataset}_Phantom" / "imagesTs"
    run_everywhere(
        [site],
        lambda _: [
            *("nnUNetv2_predict_from_modelfolder", "-m", str(model), "-f", "0", "-i", str(images), "-o", str(output)),
            *("-device", "cpu", "-npp", "1", "-nps", "1"),
        ],
        step="predict",
        log_folder=logs,
    )


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_sites_behind_masks_plan_and_train_with_different_classes(tmp_path):
    sites, logs = make_union_sites(tmp_path), tmp_path / "logs"
    with running_coordinator(tmp_path / "coordinator", sites, [*OPTIONS, "--epochs", "2", "--secure"]):
        plan(sites, logs)
        run_everywhere(sites, train_command, step="train", log_folder=logs)
    north, south, west = (final_weights(site) for site in sites)
    for tensor, values in south.items():
        rows = [0, 2] if ".seg_layers." in tensor else slice(None)  # lesions are those of two sites only
        np.testing.assert_array_equal(values[rows], north[tensor][rows], err_msg=tensor)
    heads = [tensor for tensor in south if ".seg_layers." in tensor]
    assert any(not np.array_equal(south[head][1], west[head][1]) for head in heads)
    with Store(tmp_path / "coordinator") as store:
        dice = store.load_validations(RUN)[-1]["dice"]
        assert dice[0] is None and dice[1] is not None
        assert "labels" in store.load_rounds(RUN)[-1]["settings"]
