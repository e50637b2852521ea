import pytest

from nnunetv2.utilities import early_writing
from nnunetv2.utilities.early_writing import STEP_BYTES, begin_writing


def test_the_disk_begins_with_large_steps_only(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * (STEP_BYTES - 1))
        assert begin_writing(file, 0) == 0
        file.write(b"xx")
        assert begin_writing(file, 0) == STEP_BYTES + 1
        assert begin_writing(file, STEP_BYTES + 1) == STEP_BYTES + 1
    assert (tmp_path / "file").stat().st_size == STEP_BYTES + 1


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_what_is_written_is_the_same_with_and_without_the_hint(tmp_path, monkeypatch, platform):
    monkeypatch.setattr(early_writing.sys, "platform", platform)
    early_writing._sync_file_range.cache_clear()
    content, begun = bytes(range(256)) * (STEP_BYTES // 64), 0
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for offset in range(0, len(content), STEP_BYTES):
            file.write(content[offset : offset + STEP_BYTES])
            begun = begin_writing(file, begun)
    early_writing._sync_file_range.cache_clear()
    assert begun == len(content)
    assert (tmp_path / "file").read_bytes() == content
