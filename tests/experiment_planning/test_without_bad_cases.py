"""Planning and preprocessing that leave out what cannot be used, and say so."""

import json
import logging

import numpy as np
import pytest
from planning_scans import write_nifti

from benchmarks import bad_cases
from nnunetv2.evaluation.case_files import list_pairs
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entrypoints
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.federated_planning import make_census
from nnunetv2.experiment_planning.verify_dataset_integrity import leave_out_bad_cases
from nnunetv2.federated.commands.manifest import collect
from nnunetv2.federated.protocol.messages import Census
from nnunetv2.preprocessed_data.bad_cases import load_bad_cases

SPEED = ("-npfp", "1", "-np", "1", "--no_pbar", "-c", "3d_fullres")


@pytest.fixture
def folder(make_scans, make_case, monkeypatch):
    """Write seven cases: the image of one is cut off, the label of another has another shape."""

    def construct(self, *args, constructor=DatasetFingerprintExtractor.__init__, **kwargs):
        constructor(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 3000

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", construct)
    raw = make_scans({f"case_{i}": make_case(i, shape=(10, 20, 24)) for i in range(7)})
    image = raw / "imagesTr" / "case_2_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-2000])
    write_nifti(np.ones((9, 20, 24), np.uint8), raw / "labelsTr" / "case_5.nii.gz")
    return raw


@pytest.fixture
def preprocessed(folder, roots):
    return roots["nnUNet_preprocessed"] / folder.name


def plan(*options: str) -> None:
    entrypoints.plan_and_preprocess_main(["-d", "2", *SPEED, *options])


def test_bad_cases_are_left_out_and_listed(folder, preprocessed, capsys, caplog):
    with caplog.at_level(logging.INFO, "nnunetv2"):
        plan("--without_bad_cases")
    assert [(one.case, one.file) for one in load_bad_cases(preprocessed)] == [
        ("case_2", "imagesTr/case_2_0000.nii.gz"),
        ("case_5", "labelsTr/case_5.nii.gz"),
    ]
    assert "label and image differ in shape" in load_bad_cases(preprocessed)[1].reason
    assert len(json.loads((preprocessed / "dataset_fingerprint.json").read_text())["spacings"]) == 5
    for name in ("nnUNetPlans_3d_fullres/*.pkl", "gt_segmentations/*"):
        assert {file.name[:6] for file in preprocessed.glob(name)} == {f"case_{i}" for i in (0, 1, 3, 4, 6)}
    printed = capsys.readouterr().out
    assert "2 bad cases left out, 5 cases used" in printed
    assert "Dataset002_Scans: 5 training cases" in printed
    assert printed.rstrip().count("2 bad cases are left out: case_2, case_5") == 1  # at the end; the log has the others
    assert "2 bad cases are left out: case_2, case_5" in caplog.text


def test_without_the_option_the_error_stays(folder, preprocessed):
    with pytest.raises(Exception, match="case_2"):
        plan()
    with pytest.raises(InvalidDatasetError, match="2 errors in 2 of 7 cases"):
        plan("--verify_dataset_integrity")
    assert not (preprocessed / "bad_cases.json").exists()


def test_a_run_without_the_option_uses_all_cases_again(folder, preprocessed, caplog):
    plan("--without_bad_cases", "--no_pp")
    with caplog.at_level(logging.WARNING, "nnunetv2"), pytest.raises(Exception, match="case_2"):
        plan()
    assert "bad_cases.json is removed: its 2 cases are used again" in caplog.text
    assert not (preprocessed / "bad_cases.json").exists()


@pytest.mark.slow
def test_a_repaired_case_comes_back(folder, preprocessed, make_case):
    plan("--without_bad_cases", "--no_pp")
    write_nifti(make_case(5, shape=(10, 20, 24))[1], folder / "labelsTr" / "case_5.nii.gz")
    plan("--without_bad_cases")
    assert [one.case for one in load_bad_cases(preprocessed)] == ["case_2"]
    assert len(json.loads((preprocessed / "dataset_fingerprint.json").read_text())["spacings"]) == 6
    assert len(list((preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 6


def test_preprocessing_alone_keeps_to_the_list_and_can_extend_it(folder, preprocessed, caplog):
    plan("--without_bad_cases", "--no_pp")
    entrypoints.preprocess_main(["-d", "2", "-c", "3d_fullres", "-np", "1", "--no_pbar"])
    assert "2 bad cases are left out" in caplog.text
    (folder / "labelsTr" / "case_6.nii.gz").write_bytes(b"")
    entrypoints.preprocess_main(["-d", "2", "-c", "3d_fullres", "-np", "1", "--no_pbar", "--without_bad_cases"])
    assert [one.case for one in load_bad_cases(preprocessed)] == ["case_2", "case_5", "case_6"]
    assert len(list((preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 4


def test_missing_images_and_labels_are_left_out(folder, preprocessed):
    (folder / "imagesTr" / "case_0_0000.nii.gz").unlink()
    (folder / "labelsTr" / "case_1.nii.gz").unlink()
    leave_out_bad_cases(str(folder))
    assert {one.case: one.reason.split(" (")[0] for one in load_bad_cases(preprocessed)} == {
        "case_0": "a label has no image",
        "case_1": "file is missing",
        "case_2": "damaged file",
        "case_5": "label and image differ in shape",
    }


def test_what_no_single_case_explains_stays_an_error(folder, preprocessed, make_scans, make_case):
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"numTraining": 7', '"numTraining": 8'))
    with pytest.raises(InvalidDatasetError, match="numTraining"):
        leave_out_bad_cases(str(folder))
    for file in (folder / "labelsTr").iterdir():
        file.write_bytes(b"")
    (folder / "dataset.json").write_text(text)
    with pytest.raises(InvalidDatasetError, match="7 errors in 7 of 7 cases"):
        leave_out_bad_cases(str(folder))
    assert not (preprocessed / "bad_cases.json").exists()


@pytest.mark.slow
def test_federated_planning_and_the_manifest_count_what_is_used(folder, preprocessed):
    plan("--without_bad_cases", "--no_pp")
    extractor = DatasetFingerprintExtractor(folder.name, 1)
    assert make_census(extractor, share_extrema=False).num_cases == 5
    census = next(
        one for one in collect(folder.name, [], trainer="", plans_name="none") if isinstance(one.message, Census)
    )
    assert census.message.num_cases == 5


def test_evaluation_does_not_ask_for_predictions_of_bad_cases(folder, preprocessed, tmp_path):
    plan("--without_bad_cases", "--no_pp")
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for case in (0, 1, 3, 4, 6):
        (predictions / f"case_{case}.nii.gz").touch()
    assert len(list_pairs(str(folder / "labelsTr"), str(predictions), ".nii.gz", chill=False)) == 5
    (predictions / "case_6.nii.gz").unlink()
    with pytest.raises(AssertionError, match="case_6"):
        list_pairs(str(folder / "labelsTr"), str(predictions), ".nii.gz", chill=False)


def test_a_list_that_was_edited_into_nonsense_is_refused(folder, preprocessed):
    preprocessed.mkdir()
    (preprocessed / "bad_cases.json").write_text('["case_2"]')
    with pytest.raises(ValueError, match="must hold a list of entries .*--without_bad_cases"):
        DatasetFingerprintExtractor(folder.name, 1)


@pytest.mark.slow
def test_commands_train_on_the_sound_cases_of_a_dataset_with_broken_ones(tmp_path):
    lines = []
    bad_cases.run(tmp_path / "run", 20, lines.append)
    assert lines[-1] == "17 of 20 cases were used"
