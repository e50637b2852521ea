"""The integrity check of raw datasets: what it notices and how it tells. test_bad_input.py has the faults singly."""

import json
from contextlib import suppress

import numpy as np
import pytest
from planning_scans import write_nifti

from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.integrity.cases import find_intensity_faults, find_label_faults
from nnunetv2.experiment_planning.integrity.dataset_json import determine_expected_labels
from nnunetv2.experiment_planning.integrity.findings import Finding, count, enumerate_some, format_findings
from nnunetv2.experiment_planning.integrity.geometry import find_displacement, get_geometry
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_dataset_integrity, verify_labels
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.command_line import run_command


@pytest.fixture
def folder(make_scans, make_case):
    return make_scans({f"case_{i}": make_case(i) for i in range(3)})


def change_dataset_json(folder, *, remove=(), **changes):
    file = folder / "dataset.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def test_sound_dataset_passes(folder, capsys):
    verify_dataset_integrity(str(folder), 1)
    printed = capsys.readouterr().out
    assert "Dataset002_Scans passed the integrity check: 3 cases, 1 channel, labels 0, 1, 2" in printed
    assert "Warnings" not in printed


def test_old_name_of_channels_is_accepted(folder):
    change_dataset_json(folder, remove=["channel_names"], modality={"0": "MR"})
    verify_dataset_integrity(str(folder), 1)


def test_all_that_is_wrong_is_reported_at_once(folder, make_case, capsys):
    _, label, _ = make_case(0)
    change_dataset_json(folder, numTraining=4)
    write_nifti(np.ones((6, 8, 11), np.uint8), folder / "labelsTr" / "case_0.nii.gz")
    write_nifti(label * 3, folder / "labelsTr" / "case_1.nii.gz", (3.0, 1.5, 1.25))
    (folder / "labelsTr" / "case_2.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 errors in 3 of 3 cases, listed above\. The first: dataset\.json"):
        verify_dataset_integrity(str(folder), 2)
    printed = capsys.readouterr().out
    for line in (
        "   case_0  labelsTr/case_0.nii.gz  6 x 8 x 11  6 x 8 x 10",
        "   case_1  labelsTr/case_1.nii.gz  3, 6   0, 1, 2",
        "   case_1  labelsTr/case_1.nii.gz  3, 1.5, 1.25 mm  3, 1.5, 1 mm",
        "   case_2  labelsTr/case_2.nii.gz  no label",
        "   dataset.json  3 cases, such as case_0, case_1, case_2  4 cases",
    ):
        assert line in printed
    assert printed.count("   Remedy: ") == 5


def test_errors_are_of_the_expected_kinds(folder):
    (folder / "labelsTr" / "case_0.nii.gz").write_bytes(b"")
    for kind in (AssertionError, RuntimeError, ValueError, InvalidDatasetError):
        with pytest.raises(kind, match="case_0"):
            verify_dataset_integrity(str(folder), 1)


def test_many_faults_of_one_kind_do_not_hide_the_others():
    findings = [
        Finding(f"case_{i:03}", f"labelsTr/case_{i:03}.nii.gz", "shapes differ", str(i), "0", "resample")
        for i in range(300)
    ]
    table = format_findings("Errors", [*findings, Finding("", "dataset.json", "odd", "", "", "look")])
    assert len(table.splitlines()) < 25
    assert "1. Shapes differ (300 times)" in table and "... and 290 more" in table
    assert table.endswith("2. Odd\n   FILE\n   dataset.json\n   Remedy: look.")


def test_numbers_in_words():
    assert [count(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]
    assert enumerate_some([1.5, "a", 2.0], 2) == "1.5, a and 1 more"


def test_warnings_do_not_fail_the_check(make_scans, make_case, capsys):
    images, label, spacing = make_case(1)
    folder = make_scans(
        {
            "full": make_case(0),
            "void": make_case(1, foreground=False),
            "flat": ([np.ones_like(image) for image in images], label, spacing),
        },
        labels={"background": 0, "organ": 1, "tumour": 2, "never": 3},
    )
    verify_dataset_integrity(str(folder), 1)
    printed = capsys.readouterr().out
    assert "   void  labelsTr/void.nii.gz" in printed
    assert "   flat  imagesTr/flat_0000.nii.gz  1" in printed
    assert "Labels occur in no case" in printed and "dataset.json  3" in printed


def test_slightly_different_places_are_a_warning(folder, capsys):
    import SimpleITK

    file = str(folder / "labelsTr" / "case_0.nii.gz")
    label = SimpleITK.ReadImage(file)
    label.SetOrigin((0.01, 0.0, 0.0))
    SimpleITK.WriteImage(label, file)
    verify_dataset_integrity(str(folder), 1)
    assert "Label and image differ in origin slightly" in capsys.readouterr().out


def test_first_image_need_not_be_readable(folder, capsys):
    (folder / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(InvalidDatasetError, match="1 error in 1 of 3 cases.*case_0"):
        verify_dataset_integrity(str(folder), 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "a": 1, "b": 3}, "0, 1, 3; 1 is followed by 3"),
        ({"background": 0, "a": 2}, "0 is followed by 2"),
    ],
)
def test_labels_must_be_consecutive(labels, message):
    with pytest.raises(AssertionError, match=message):
        determine_expected_labels({"labels": labels})


def test_ignore_label_and_regions_are_expected():
    assert determine_expected_labels({"labels": {"background": 0, "a": 1, "ignore": 2}}) == [0, 1, 2]
    assert determine_expected_labels(
        {"labels": {"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    ) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0, 1.5], "1.5"),
        ([0, -1], "-1"),
        ([0, 1e6], "1e+06"),
        ([0, 1, 3, 7], "3, 7"),
        ([0, np.nan], "1 voxels"),
        ([np.inf, 1], "1 voxels"),
        ([0, 1], None),
        ([], None),
    ],
)
def test_label_values(values, found):
    faults, _ = find_label_faults(np.array(values, dtype=np.float32), [0, 1])
    assert [fault.found for fault in faults] == ([] if found is None else [found])


def test_occurring_labels_are_returned():
    assert find_label_faults(np.array([0.0, 2.0, 2.0]), [0, 1, 2])[1] == {0, 2}


def test_non_finite_intensities_are_counted():
    image = np.zeros((2, 2, 2, 2))
    assert not find_intensity_faults(image)
    image[0, 0, 0] = np.nan, -np.inf
    assert find_intensity_faults(image)[0].found == "2 voxels"


def sitk_properties(origin=(1.0, 2.0, 3.0), spacing=(1.0, 1.5, 3.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    return {"sitk_stuff": {"origin": origin, "spacing": spacing, "direction": direction}}


def test_displacement_is_that_of_the_farthest_corner():
    image = get_geometry(sitk_properties())
    shifted = find_displacement(image, get_geometry(sitk_properties((1.0, 2.0, 7.0))), (4, 5, 6))
    assert (shifted.what, shifted.millimetres, shifted.is_material) == ("origin", 4.0, True)
    assert (shifted.found, shifted.expected) == ("1, 2, 7", "1, 2, 3")
    mirrored = get_geometry(sitk_properties(direction=(1, 0, 0, 0, -1, 0, 0, 0, 1)))
    turned = find_displacement(image, mirrored, (4, 5, 6))
    assert (turned.what, turned.millimetres) == ("direction", 2 * 4 * 1.5)
    assert find_displacement(image, image, (4, 5, 6)) is None
    assert find_displacement(image, None, (4, 5, 6)) is None


def test_geometry_of_nibabel_is_that_which_the_network_sees():
    affine = np.diag([-1.0, 1.5, 3.0, 1.0])
    towards_ras = np.diag([1.0, 1.5, 3.0, 1.0])
    as_it_is = get_geometry({"nibabel_stuff": {"original_affine": affine}})
    assert as_it_is.direction[0] == (-1, 0, 0) and as_it_is.spacing == (1, 1.5, 3)
    reoriented = get_geometry({"nibabel_stuff": {"original_affine": affine, "reoriented_affine": towards_ras}})
    assert reoriented.direction[0] == (1, 0, 0)
    assert get_geometry({"spacing": (1, 1, 1)}) is None


def test_users_readers_get_all_images_of_a_case_at_once(folder, capsys):
    class Sum:
        def read_images(self, files):
            assert len(files) == 1
            return np.ones((2, 2, 3, 4)) * [[[1, 2, 3, 4]]], {"spacing": (1, 1, 1)}

        def read_seg(self, file):
            return np.ones((1, 2, 3, 4)), {"spacing": (1, 1, 1)}

    assert check_cases(["a"], "b", 2, Sum)
    assert not check_cases(["a"], "b", 3, Sum)


def test_helpers_answer_for_single_files(folder, capsys):
    label = str(folder / "labelsTr" / "case_0.nii.gz")
    images = [str(folder / "imagesTr" / "case_0_0000.nii.gz")]
    assert verify_labels(label, SimpleITKIO, [0, 1, 2])
    assert not verify_labels(label, SimpleITKIO, [0, 1])
    assert f"Error: {label}: a label has unexpected values (found 2, expected 0, 1)" in capsys.readouterr().out
    assert check_cases(images, label, 1, SimpleITKIO)
    assert not check_cases(images, label, 2, SimpleITKIO)


HOSTILE = "liver\x1b]0;owned\x07\x1b[2K\u202e\nDataset002_Scans passed"


def test_names_in_dataset_json_do_not_command_the_terminal(folder, capsys):
    """The bar of progress returns to the beginning of its line; nothing else moves."""
    for changes in (
        {"labels": {"background": 0, HOSTILE: 1, "b": 2}},
        {"channel_names": {"0": HOSTILE}},
        {"labels": {"background": 0, HOSTILE: 7}},
        {"channel_names": {HOSTILE: "MR"}},
        {"labels": {"background": 0, "a": HOSTILE}},
        {"file_ending": HOSTILE},
        {"name": HOSTILE},
    ):
        before = (folder / "dataset.json").read_text()
        change_dataset_json(folder, **changes)
        with suppress(SystemExit):
            run_command(lambda: verify_dataset_integrity(str(folder), 1))
        text = "".join(capsys.readouterr())
        assert text.replace("\n", "").replace("\r", "").isprintable(), (changes, ascii(text))
        (folder / "dataset.json").write_text(before)
