"""Whatever is wrong with a JSON file that people edit, the message names the file."""

from __future__ import annotations

import pytest

from nnunetv2.utilities.json_files import PLANS, JsonFileError, read_json


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}', b'\xef\xbb\xbf{\r\n"a": 1\r\n}\r\n'],
    ids=["plain", "byte order mark", "as Windows saves it"],
)
def test_what_editors_save_is_read(tmp_path, content):
    (tmp_path / "plans.json").write_bytes(content)
    assert read_json(tmp_path / "plans.json") == {"a": 1}


def test_what_is_missing_is_told_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="^plan the dataset first$"):
        read_json(tmp_path / "plans.json", if_missing="plan the dataset first")
    with pytest.raises(FileNotFoundError, match=r"plans\.json"):
        read_json(tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,}', "is not valid JSON"),
        (b"[1, 2", "is not valid JSON"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbf", "is not valid JSON"),
        (b"[1]", "must hold names in braces"),
        (b"null", "must hold names in braces"),
        ('{"a": 1}'.encode("utf-16"), "is not encoded in UTF-8"),
        ('{"ä": 1}'.encode("latin-1"), "is not encoded in UTF-8"),
        (b"[" * 100_000, "plans.json"),
    ],
)
def test_the_message_names_the_file(tmp_path, content, problem):
    (tmp_path / "plans.json").write_bytes(content)
    with pytest.raises(JsonFileError, match=problem) as caught:
        read_json(tmp_path / "plans.json")
    assert str(tmp_path / "plans.json") in str(caught.value)


def test_a_list_may_be_asked_for(tmp_path):
    (tmp_path / "splits.json").write_text("[]")
    assert read_json(tmp_path / "splits.json", list) == []
    (tmp_path / "splits.json").write_text("{}")
    with pytest.raises(JsonFileError, match="must hold a list"):
        read_json(tmp_path / "splits.json", list)


def test_keys_that_occur_twice_are_refused_where_asked_for(tmp_path):
    (tmp_path / "plans.json").write_text('{"a": {"b": 1, "b": 2}}')
    assert read_json(tmp_path / "plans.json") == {"a": {"b": 2}}
    with pytest.raises(JsonFileError, match=r"plans.json: 'b' occurs twice"):
        read_json(tmp_path / "plans.json", refuse_duplicates=True)


@pytest.mark.parametrize("content", ["{}", '{"configurations": 3}', '{"configurations": null}'])
def test_a_file_that_lacks_what_matters_is_named(tmp_path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(JsonFileError, match=r"plans.json must hold names in braces, \{...\} under 'configurations'"):
        read_json(tmp_path / "plans.json", required=PLANS)
