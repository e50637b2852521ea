"""Sites that annotate different classes agree on their numbers, plan alike, and keep their raw data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from fake_federation import LocalFederation, in_threads, make_settings, outcomes_in_threads, served
from union_sites import annotate

from demo.phantoms import Scanner, write_dataset
from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated
from nnunetv2.experiment_planning.plan_and_preprocess_api import copy_labels, plan_experiments, preprocess_dataset
from nnunetv2.federated.commands.manifest import collect
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.privacy.disclosure import allow_list_of
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessed_data.datasets import nnUNetDatasetBlosc2

DATASETS = {"A": "Dataset501_A", "B": "Dataset502_B", "C": "Dataset503_C"}
UNION = {"background": 0, "lesion": 1, "organ": 2}


@pytest.fixture
def federation(roots, tmp_path) -> Iterator[LocalFederation]:
    """A annotates organs, and B both, lesions first; C has not come yet."""
    for number, name in enumerate(DATASETS.values()):
        scanner = Scanner(spacing_mm=(3.0, 3.0, 3.0), intensities=(60, 95 + number, 130), noise=0.2, bias=0.05)
        write_dataset(roots["nnUNet_raw"] / name, scanner, num_train=2, num_test=0, seed=number)
    annotate(roots["nnUNet_raw"] / DATASETS["A"], {"organ": 1})
    annotate(roots["nnUNet_raw"] / DATASETS["B"], {"lesion": 1, "organ": 2})
    annotate(roots["nnUNet_raw"] / DATASETS["C"], {"lesion": 5})
    with served(tmp_path / "federation", make_settings(labels="union")) as federation:
        yield federation


def plan(federation: LocalFederation, site: str, mode: str = "ffe") -> str:
    credential = federation.credential(site)
    assert credential.labels == "union"
    return plan_federated(
        DATASETS[site],
        PlanningOptions(mode=mode, num_processes=1, show_progress_bar=False),
        credential_file=federation.credential_file(site),
    )


def plan_all(federation: LocalFederation, *sites: str, mode: str = "ffe") -> None:
    for result in in_threads(*(lambda site=site: plan(federation, site, mode) for site in sites)):
        assert result == "nnUNetPlans", result


def read(roots, site: str, name: str = "dataset.json", root: str = "nnUNet_preprocessed") -> dict:
    return json.loads((roots[root] / DATASETS[site] / name).read_text())


def labels_in(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_all_sites_plan_for_all_classes(federation, roots, capsys):
    before = {site: read(roots, site, root="nnUNet_raw") for site in "AB"}
    plan_all(federation, "A", "B")
    assert "Class 1, lesion: annotated at 1 site, not here." in capsys.readouterr().out
    assert before == {site: read(roots, site, root="nnUNet_raw") for site in "AB"}
    planned = read(roots, "A")
    assert planned["labels"] == UNION
    assert planned["annotated_labels"] == ["background", "organ"]
    assert planned["values_in_raw_data"] == {"background": 0, "organ": 1}
    assert read(roots, "B")["labels"] == UNION
    plans = [{**read(roots, site, "nnUNetPlans.json"), "dataset_name": ""} for site in "AB"]
    assert plans[0] == plans[1]


def test_preprocessing_maps_values_and_their_copies(federation, roots, caplog):
    plan_all(federation, "A", "B")
    for site in "AB":
        preprocess_dataset(DATASETS[site], configurations=("3d_fullres",), num_processes=1, show_progress_bar=False)
    assert not [record for record in caplog.records if "changed" in record.message]
    for site, value in (("A", {1: 2}), ("B", {1: 1, 2: 2})):
        folder = roots["nnUNet_preprocessed"] / DATASETS[site]
        for raw in sorted((roots["nnUNet_raw"] / DATASETS[site] / "labelsTr").iterdir()):
            own, copied = labels_in(raw), labels_in(folder / "gt_segmentations" / raw.name)
            expected = np.select([own == old for old in value], list(value.values()), 0)
            np.testing.assert_array_equal(copied, expected)
        dataset = nnUNetDatasetBlosc2(str(folder / "nnUNetPlans_3d_fullres"))
        found = {label for case in dataset.identifiers for label in np.unique(dataset.load_case(case)[1][:])}
        assert found - {-1, 0} == set(value.values())
        properties = dataset.load_case(dataset.identifiers[0])[3]
        assert [label for label, drawn in properties["class_locations"].items() if len(drawn)] == [*value.values()]


def test_copies_of_labels_are_made_once_and_follow_their_originals(federation, roots):
    plan_all(federation, "A", "B")
    copy = next(iter(sorted((roots["nnUNet_raw"] / DATASETS["A"] / "labelsTr").iterdir())))
    target = roots["nnUNet_preprocessed"] / DATASETS["A"] / "gt_segmentations" / copy.name
    copy_labels(DATASETS["A"], SimpleITKIO())
    first = target.stat()
    copy_labels(DATASETS["A"], SimpleITKIO())
    assert target.stat().st_ino == first.st_ino
    image = sitk.ReadImage(str(copy))
    changed = sitk.GetImageFromArray(np.ones_like(sitk.GetArrayFromImage(image)))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(copy))
    copy_labels(DATASETS["A"], SimpleITKIO())
    assert (labels_in(target) == 2).all()
    target.write_bytes(copy.read_bytes())  # somebody has mended the copy by hand
    copy_labels(DATASETS["A"], SimpleITKIO())
    assert (labels_in(target) == 1).all()


def test_copies_are_those_of_the_raw_data_again_when_the_site_plans_by_itself(federation, roots):
    plan_all(federation, "A", "B")
    copy_labels(DATASETS["A"], SimpleITKIO())
    plan_experiments([DATASETS["A"]])
    assert read(roots, "A") == read(roots, "A", root="nnUNet_raw")
    copy_labels(DATASETS["A"], SimpleITKIO())
    for raw in sorted((roots["nnUNet_raw"] / DATASETS["A"] / "labelsTr").iterdir()):
        target = roots["nnUNet_preprocessed"] / DATASETS["A"] / "gt_segmentations" / raw.name
        np.testing.assert_array_equal(labels_in(target), labels_in(raw))


def test_sites_that_plan_alone_agree_on_classes_all_the_same(federation, roots):
    plan_all(federation, "A", "B", mode="asym")
    assert [read(roots, site)["labels"] for site in "AB"] == [UNION] * 2
    assert not (roots["nnUNet_preprocessed"] / DATASETS["A"] / "dataset_fingerprint_local.json").exists()


def test_a_late_site_takes_the_numbers_of_the_others(federation, roots):
    plan_all(federation, "A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    plan(federation, "C")
    planned = read(roots, "C")
    assert planned["labels"] == UNION
    assert planned["values_in_raw_data"] == {"background": 0, "lesion": 5}


def test_a_late_site_with_a_class_of_its_own_is_refused(federation, roots):
    plan_all(federation, "A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    annotate(roots["nnUNet_raw"] / DATASETS["C"], {"lesion": 1, "vessel": 2})
    with pytest.raises(RefusedError, match=r"site C comes late with 'vessel', and the classes .* are numbered already"):
        plan(federation, "C")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"Organ": 1}, "'Organ' at A and 'organ' at B look like one class in two spellings"),
        ({"organs": 1}, "'organ' at B and 'organs' at A look like one class"),
        ({"vessel": 1}, "site A annotates 'vessel', and no other site does: the others annotate 'lesion', 'organ'"),
        ({"whole": [1, 2]}, "'whole' of site A is a region"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(federation, roots, labels, words):
    file = roots["nnUNet_raw"] / DATASETS["A"] / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": {"background": 0, **labels}}))
    refusals = outcomes_in_threads(*(lambda site=site: plan(federation, site) for site in "AB"))
    for error in refusals:
        assert isinstance(error, RefusedError) and words in str(error)


def test_the_manifest_lists_the_rows_that_a_site_sends(federation, roots):
    plan_all(federation, "A", "B")
    documents = collect(DATASETS["A"], ["3d_fullres"], trainer="nnUNetTrainerAsymFedAvg", plans_name="nnUNetPlans")
    update = next(one for one in documents if one.kind == "update" and one.specs)
    rows = [name for name in update.specs if "seg_layers.0" in name]
    assert {name.split(".")[3] for name in rows} == {"row0", "row2"}
    registration = next(one for one in documents if one.kind == "registration")
    assert registration.message.dataset_json.annotated_labels == ("background", "organ")
    allowed = allow_list_of(documents, coordinator=None).documents["registration"]
    assert {"tensors.only_received", "dataset_json.annotated_labels"} <= {*allowed.fields}
