"""Tests of deciding what to predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.case_lists import case_id, list_cases, list_folder, require_previous_stage, without_finished
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

TWO_CHANNELS = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz"}
COLOURS = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}


def make_folder(tmp_path, *names):
    for name in names:
        (tmp_path / name).touch()
    return tmp_path


def list_it(folder, dataset_json=TWO_CHANNELS):
    cases = list_folder(folder, dataset_json, create_lists_from_splitted_dataset_folder)
    return [[Path(file).name for file in files] for files in cases]


def list_all(images, outputs, **changes):
    options = {"reader": SimpleITKIO, "previous_stage_folder": None, "part_id": 0, "num_parts": 1, **changes}
    return list_cases(images, outputs, ".nii.gz", **options)


def test_files_are_grouped_by_case(tmp_path):
    folder = make_folder(tmp_path, "b_0000.nii.gz", "b_0001.nii.gz", "a_1_0001.nii.gz", "a_1_0000.nii.gz", "readme.md")
    assert list_it(folder) == [["a_1_0000.nii.gz", "a_1_0001.nii.gz"], ["b_0000.nii.gz", "b_0001.nii.gz"]]


def test_files_without_channel_number_are_passed_over_with_a_warning(tmp_path, caplog):
    folder = make_folder(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "a.nii.gz")
    assert len(list_it(folder)) == 1
    assert "a.nii.gz" in caplog.text


def test_an_empty_folder_is_an_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CASE_0000\.nii\.gz.*0000 = T1, 0001 = T2"):
        list_it(make_folder(tmp_path, "scan.nii"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_it(tmp_path / "nowhere")


@pytest.mark.parametrize("numbers", [("0000",), ("0000", "0002"), ("0001",), ("0000", "0001", "0002")])
def test_a_case_with_wrong_channels_is_named(tmp_path, numbers):
    make_folder(tmp_path, "good_0000.nii.gz", "good_0001.nii.gz")
    make_folder(tmp_path, *(f"odd_{number}.nii.gz" for number in numbers))
    with pytest.raises(ValueError, match="case odd: found channels"):
        list_it(tmp_path)


def test_one_file_may_hold_all_channels(tmp_path):
    assert list_it(make_folder(tmp_path, "eye_0000.png", "nose_0000.png"), COLOURS) == [
        ["eye_0000.png"],
        ["nose_0000.png"],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/x/liver_1_0000.nii.gz", "liver_1"),
        ("liver_1.nii.gz", "liver_1"),
        ("year_2020_0001.nii.gz", "year_2020"),
        ("v1.2_0000.nii.gz", "v1.2"),
        ("other.mha", "other"),
    ],
)
def test_cases_are_called_by_their_first_file(name, expected):
    assert case_id(name, ".nii.gz") == expected


def test_parts_take_every_nth_case():
    images = [[f"/in/{name}_0000.nii.gz"] for name in "abcde"]
    part = list_all(images, "/out", part_id=1, num_parts=2, previous_stage_folder="/before")
    assert part.outputs == ["/out/b", "/out/d"]
    assert part.previous_stage == ["/before/b.nii.gz", "/before/d.nii.gz"]
    assert list_all(images, list("12345"), part_id=1, num_parts=2).outputs == ["2", "4"]
    assert list_all(images, None).outputs is None


def test_paths_count_as_text():
    cases = list_all([[Path("/in/a_0000.nii.gz")]], Path("/out"))
    assert cases.images == [["/in/a_0000.nii.gz"]]
    assert cases.outputs == ["/out/a"]


def test_two_cases_with_one_output_are_refused():
    with pytest.raises(ValueError, match="two cases would be written to /out/scan"):
        list_all([["/monday/scan.nii.gz"], ["/tuesday/scan.nii.gz"]], "/out")


@pytest.mark.parametrize("outputs", [None, "folder", ["a", "b"]])
def test_a_case_without_an_image_is_named(outputs):
    with pytest.raises(ValueError, match=r"case number 1 \(counted from 0\) has no image"):
        list_all([["a_0000.nii.gz"], []], outputs)


def test_each_case_needs_an_output():
    with pytest.raises(ValueError, match="1 cases, but 2 output"):
        list_all([["a_0000.nii.gz"]], ["a", "b"])


def test_finished_cases_are_those_with_all_files(tmp_path):
    make_folder(tmp_path, "a.nii.gz", "b.nii.gz", "b.npz", "c.nii.gz", "c.npz", "c.pkl")
    cases = list_all([[f"{name}_0000.nii.gz"] for name in "abcd"], tmp_path)
    assert [files[0][0] for files in without_finished(cases, ".nii.gz", SimpleITKIO, False).images] == ["d"]
    assert [files[0][0] for files in without_finished(cases, ".nii.gz", SimpleITKIO, True).images] == ["a", "b", "d"]


def test_missing_predictions_of_the_previous_stage_are_named(tmp_path, caplog):
    make_folder(tmp_path, "a.nii.gz")
    cases = list_all([["a_0000.nii.gz"], ["b_0000.nii.gz"]], None, previous_stage_folder=tmp_path)
    require_previous_stage(cases)
    assert "1 of 2 cases" in caplog.text and "b.nii.gz" in caplog.text
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 cases.*b\.nii\.gz"):
        require_previous_stage(cases)


def test_images_in_another_format_are_named_with_what_to_do(tmp_path):
    folder = make_folder(tmp_path, "a_0000.mha", "a_0001.mha", "notes.txt")
    with pytest.raises(
        FileNotFoundError,
        match=r"expects files named CASE_0000.nii.gz.*end in .mha: convert them to "
        r".nii.gz, or write \"file_ending\": \".mha\" into the model's",
    ):
        list_it(folder)
    with pytest.raises(FileNotFoundError) as info:
        list_it(tmp_path / "empty")
    assert "convert" not in str(info.value)
