"""The pooled fingerprint of real scans equals that of one centre holding all of them, for any split and any order."""

from __future__ import annotations

import csv
import json
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.federated.commands.simulate import LocalSite, running_coordinator

EXACT = ("median", "percentile_00_5", "percentile_99_5")


def hippocampus(shared_data: Path) -> tuple[dict, dict[str, list[tuple[Path, Path]]]]:
    folder = shared_data / "hippocampus"
    sites = defaultdict(list)
    with (folder / "sites.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = f"{row['case']}.nii.gz"
            sites[row["site"]].append((folder / "images" / name, folder / "labels" / name))
    return {"background": 0, "anterior": 1, "posterior": 2}, dict(sites)


def spinalcord(shared_data: Path) -> tuple[dict, dict[str, list[tuple[Path, Path]]]]:
    sites = {}
    for folder in sorted(path for path in (shared_data / "spinalcord").iterdir() if path.is_dir()):
        sites[folder.name] = [
            (image, folder / "labels" / image.name) for image in sorted((folder / "images").glob("*.nii.gz"))
        ]
    return {"background": 0, "white": 1, "gray": 2}, sites


def write_dataset(folder: Path, labels: dict, cases: list[tuple[Path, Path]]) -> None:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for image, label in cases:
        case = image.name.removesuffix(".nii.gz")
        (folder / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(image)
        (folder / "labelsTr" / f"{case}.nii.gz").symlink_to(label)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                # the scheme that reads the pooled statistics
                "channel_names": {"0": "CT"},
                "labels": labels,
                "numTraining": len(cases),
                "file_ending": ".nii.gz",
            }
        )
    )


def federate(
    roots: dict, folder: Path, labels: dict, split: dict[str, list], rng, options: Sequence[str] = ()
) -> list[tuple[dict, dict]]:
    """Plan every part of the split as a site; return (fingerprint, plans) of each. Sites arrive in random order."""
    sites = []
    for number, (name, cases) in enumerate(split.items()):
        dataset = f"Dataset{501 + number}_{name}"
        write_dataset(roots["nnUNet_raw"] / dataset, labels, cases)
        sites.append(LocalSite(name=name, dataset=dataset, credential=folder / f"{name}.json"))
    errors = []

    def run(site: LocalSite) -> None:
        try:
            options = PlanningOptions(mode="ffe", num_processes=1, show_progress_bar=False)
            plan_federated(site.dataset, options, credential_file=site.credential)
        except Exception as error:  # noqa: BLE001  handed to the main thread
            errors.append(error)

    with running_coordinator(folder / "coordinator", sites, options, show=lambda line: None):
        threads = [threading.Thread(target=run, args=(site,)) for site in rng.permutation(np.array(sites, object))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    assert not errors, errors[0]
    return [
        tuple(
            json.loads((roots["nnUNet_preprocessed"] / site.dataset / name).read_text())
            for name in ("dataset_fingerprint.json", "nnUNetPlans.json")
        )
        for site in sites
    ]


def centralise(roots: dict, labels: dict, split: dict[str, list]) -> tuple[dict, dict]:
    """Extract the fingerprint of all cases in one place, and plan."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    write_dataset(roots["nnUNet_raw"] / "Dataset500_All", labels, [case for cases in split.values() for case in cases])
    extract_fingerprints([500], num_processes=1, show_progress_bar=False)
    plan_experiments([500])
    folder = roots["nnUNet_preprocessed"] / "Dataset500_All"
    return tuple(json.loads((folder / name).read_text()) for name in ("dataset_fingerprint.json", "nnUNetPlans.json"))


def shuffled_split(split: dict[str, list], rng: np.random.Generator) -> dict[str, list]:
    """Deal the same cases out to the same sites in another way, at least one to each."""
    cases = [case for part in split.values() for case in part]
    order = rng.permutation(len(cases))
    cuts = np.sort(rng.choice(np.arange(1, len(cases)), len(split) - 1, replace=False))
    return {name: [cases[i] for i in part] for name, part in zip(split, np.split(order, cuts))}


@pytest.mark.parametrize("make", [hippocampus, spinalcord])
@pytest.mark.parametrize("shuffle", [None, 1, 2])
def test_pooled_equals_centralised(make, shuffle, shared_data, roots, tmp_path):
    rng = np.random.default_rng(shuffle)
    labels, split = make(shared_data)
    if shuffle is not None:
        split = shuffled_split(split, rng)
    expected_fingerprint, expected_plans = centralise(roots, labels, split)
    results = federate(roots, tmp_path / "federation", labels, split, rng)
    for fingerprint, plans in results:
        assert fingerprint == results[0][0]
        compare_fingerprints(fingerprint, expected_fingerprint)
        compare_plans(plans, expected_plans)
        assert {**plans, "dataset_name": ""} == {**results[0][1], "dataset_name": ""}


@pytest.mark.parametrize(
    ("make", "shuffle", "geometry"),
    [
        (hippocampus, None, "list"),
        (hippocampus, 1, "quantiles"),
        (spinalcord, None, "quantiles"),
        (spinalcord, 2, "list"),
    ],
)
def test_masked_sums_equal_centralised(make, shuffle, geometry, shared_data, roots, tmp_path):
    rng = np.random.default_rng(shuffle)
    labels, split = make(shared_data)
    if shuffle is not None:
        split = shuffled_split(split, rng)
    expected_fingerprint, expected_plans = centralise(roots, labels, split)
    options = ("--secure", "--geometry", geometry)
    results = federate(roots, tmp_path / "federation", labels, split, rng, options)
    for fingerprint, plans in results:
        assert fingerprint == results[0][0]
        if geometry == "list":
            compare_fingerprints(fingerprint, expected_fingerprint)
        else:
            compare_intensities(fingerprint, expected_fingerprint)
            assert not {"spacings", "shapes_after_crop"} & fingerprint.keys()
        compare_plans(plans, expected_plans)
        assert {**plans, "dataset_name": ""} == {**results[0][1], "dataset_name": ""}


def compare_fingerprints(pooled: dict, expected: dict) -> None:
    compare_intensities(pooled, expected)

    def cases(fingerprint):
        return sorted(zip(map(tuple, fingerprint["spacings"]), map(tuple, fingerprint["shapes_after_crop"])))

    assert cases(pooled) == cases(expected)
    assert pooled["median_relative_size_after_cropping"] == expected["median_relative_size_after_cropping"]


def compare_intensities(pooled: dict, expected: dict) -> None:
    for channel, properties in expected["foreground_intensity_properties_per_channel"].items():
        found = pooled["foreground_intensity_properties_per_channel"][channel]
        for name in EXACT:
            assert found[name] == properties[name], name
        for name in ("mean", "std"):
            assert math.isclose(found[name], properties[name], rel_tol=1e-6), name
        assert found["min"] <= properties["min"] and found["max"] >= properties["max"]


def compare_plans(plans: dict, expected: dict) -> None:
    """Equal but for the dataset's name and, beyond the statistics' last digits, nothing."""

    def without(content: dict) -> dict:
        ignored = ("dataset_name", "foreground_intensity_properties_per_channel")
        return {key: value for key, value in content.items() if key not in ignored}

    assert without(plans) == without(expected)
