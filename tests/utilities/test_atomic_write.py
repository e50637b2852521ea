"""Files appear complete or not at all."""

import json
import os
import time

import pytest
from privileges import privileges_dropped

from nnunetv2.utilities.atomic_write import (
    copy_atomically,
    flush_to_disk,
    remove_leftovers,
    replacing,
    save_json_atomically,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends(tmp_path):
    with replacing(tmp_path / "scan.nii.gz") as file:
        assert file.name == "scan.nii.gz"
        file.write_text("new")
        assert not (tmp_path / "scan.nii.gz").exists()
    assert (tmp_path / "scan.nii.gz").read_text() == "new"
    assert names_in(tmp_path) == ["scan.nii.gz"]


def test_failure_keeps_the_old_content(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["a.json"]


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), replacing(tmp_path / "a"):
        pass
    assert names_in(tmp_path) == []


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such"), replacing(tmp_path / "no" / "such" / "a"):
        pass


def test_companions_go_along(tmp_path):
    with replacing(tmp_path / "a.mhd") as file:
        file.write_text("header")
        file.with_suffix(".raw").write_text("voxels")
    assert names_in(tmp_path) == ["a.mhd", "a.raw"]


def test_symbolic_link_keeps_its_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    with replacing(tmp_path / "link") as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    save_json_atomically({}, tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("keep_time", [False, True])
def test_copies_of_read_only_files_can_be_replaced(tmp_path, keep_time):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_text("voxels")
    os.utime(source, (1_600_000_000,) * 2)
    source.chmod(0o444)
    with privileges_dropped():
        for _ in range(2):
            copy_atomically(source, copy, keep_time=keep_time)
    assert copy.read_text() == "voxels" and copy.stat().st_mode & 0o200
    assert (copy.stat().st_mtime == 1_600_000_000) == keep_time


def test_a_file_that_nobody_may_write_to_is_flushed(tmp_path):
    (tmp_path / "file").touch(mode=0o444)
    with privileges_dropped():
        flush_to_disk(tmp_path / "file")


def test_json_layout(tmp_path):
    save_json_atomically({"b": 1, "a": [2]}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{\n    "a": [\n        2\n    ],\n    "b": 1\n}'
    save_json_atomically({"b": 1, "a": 2}, tmp_path / "a.json", sort_keys=False)
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"]


def test_old_leftovers_of_killed_processes_are_removed(tmp_path):
    for name, age_s in (("old", 7200), ("young", 60)):
        scratch = tmp_path / f".partial-{name}"
        scratch.mkdir()
        (scratch / "case.nii.gz").write_text("half")
        for path in (scratch / "case.nii.gz", scratch):
            os.utime(path, (time.time() - age_s,) * 2)
    (tmp_path / "case.nii.gz").write_text("whole")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-young", "case.nii.gz"]


def test_leftovers_count_as_young_while_anything_in_them_changes(tmp_path):
    scratch = tmp_path / ".partial-model"
    (scratch / "Dataset001").mkdir(parents=True)
    (scratch / "link").symlink_to("/nowhere")
    (scratch / "Dataset001" / "checkpoint.pth").write_text("half")
    for path in (scratch / "Dataset001", scratch / "link", scratch):
        os.utime(path, (time.time() - 7200,) * 2, follow_symlinks=False)
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == [".partial-model"]
    os.utime(scratch / "Dataset001" / "checkpoint.pth", (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_whoever_is_alone_removes_leftovers_of_any_age(tmp_path):
    for name, age_s in (("young", 0), ("of-a-clock-ahead", -3600)):
        (tmp_path / f".partial-{name}").mkdir()
        os.utime(tmp_path / f".partial-{name}", (time.time() - age_s,) * 2)
    remove_leftovers(tmp_path, older_than_s=0)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "x.nii.nii.gz",
        "x.nii.gz.nii.gz",
        "x.hdr.nii.gz",
        "x.img.nii.gz",
        "x.nia.nii.gz",
        "x.NII.GZ.nii.gz",
        "x.gz.nii",
        "1.2.3.nii.gz",
    ],
)
def test_itk_writes_nifti_files_with_an_ending_inside_their_name(tmp_path, name):
    import SimpleITK as sitk

    with replacing(tmp_path / name) as file:
        sitk.WriteImage(sitk.Image(4, 5, 6, sitk.sitkUInt8), str(file))
    assert names_in(tmp_path) == [name]
    assert sitk.ReadImage(str(tmp_path / name)).GetSize() == (4, 5, 6)


def test_what_is_written_beside_gets_the_name_of_the_file(tmp_path):
    with replacing(tmp_path / "x.nii.nii.gz") as file:
        file.write_text("voxels")
        file.with_name(file.name.replace(".nii.gz", ".json")).write_text("spacing")
        (file.parent / "other.txt").write_text("note")
    assert names_in(tmp_path) == ["other.txt", "x.nii.json", "x.nii.nii.gz"]


def test_a_full_disk_names_the_file_that_was_written(tmp_path):
    import errno

    def fill():
        with replacing(tmp_path / "checkpoint.pth"):
            raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(OSError, match="File too large: '.*checkpoint.pth'"):
        fill()
    assert list(tmp_path.iterdir()) == []
