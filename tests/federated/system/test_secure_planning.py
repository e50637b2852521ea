"""Sites plan from a fingerprint that they have added up behind masks: the plans are those of a federation in clear."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_federation import LocalFederation, in_threads, make_settings, served

from demo.phantoms import Scanner, write_dataset
from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.federated.protocol.api import Secure

SITES = ("A", "B", "C")
DATASETS = {site: f"Dataset50{number}_{site}" for number, site in enumerate("ABCD", 1)}


@pytest.fixture
def datasets(roots) -> None:
    """Three sites with scanners of their own."""
    for number, site in enumerate(SITES):
        write_cases(roots, site, num_train=2 + number, seed=number)


def write_cases(roots, site: str, *, num_train: int, seed: int) -> None:
    scanner = Scanner(spacing_mm=(3.1 + seed, 3.0, 3.0), intensities=(60, 95 + seed, 130), noise=0.2, bias=0.05)
    write_dataset(roots["nnUNet_raw"] / DATASETS[site], scanner, num_train=num_train, num_test=0, seed=seed)


@contextmanager
def federation_of(folder: Path, geometry: str | None) -> Iterator[LocalFederation]:
    secure = None if geometry is None else Secure(k=3, geometry=geometry)
    with served(folder, make_settings(sites=SITES, secure=secure)) as federation:
        yield federation


def plan(federation: LocalFederation, site: str, share_extrema: bool = False, **options) -> str:
    federation.credential(site)
    return plan_federated(
        DATASETS[site],
        PlanningOptions(
            mode="ffe", num_processes=1, show_progress_bar=False, share_extrema=share_extrema, planner=options
        ),
        credential_file=federation.credential_file(site),
    )


def plan_all(federation: LocalFederation, **options) -> None:
    for result in in_threads(*(lambda site=site: plan(federation, site, **options) for site in SITES)):
        if isinstance(result, BaseException):
            raise result


def read(roots, site: str, name: str) -> dict:
    return json.loads((roots["nnUNet_preprocessed"] / DATASETS[site] / name).read_text())


@pytest.mark.parametrize("geometry", ["list", "quantiles"])
def test_plans_are_those_of_a_federation_in_clear(geometry, datasets, roots, tmp_path):
    with federation_of(tmp_path / "clear", None) as federation:
        plan_all(federation)
    expected = {site: read(roots, site, "nnUNetPlans.json") for site in SITES}
    fingerprint = read(roots, "A", "dataset_fingerprint.json")
    with federation_of(tmp_path / "secure", geometry) as federation:
        plan_all(federation)
    assert {site: read(roots, site, "nnUNetPlans.json") for site in SITES} == expected
    found = read(roots, "B", "dataset_fingerprint.json")
    if geometry == "list":
        assert found == fingerprint
    else:
        assert found["geometry_statistics"]["num_cases"] == 9 and "spacings" not in found
    assert all(len(read(roots, site, "dataset_fingerprint_local.json")["spacings"]) == 2 + n for n, site in enumerate(SITES))
