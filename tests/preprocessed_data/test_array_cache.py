import pickle

import pytest

from nnunetv2.preprocessed_data.array_cache import ArrayCache


@pytest.fixture
def opened():
    return []


@pytest.fixture
def read(opened):
    def read(path):
        opened.append(path.name)
        return path.read_text()

    return read


def write(folder, *names, text="x"):
    for name in names:
        (folder / name).write_text(text)
    return [folder / name for name in names]


def test_an_array_is_opened_once(tmp_path, opened, read):
    cache = ArrayCache()
    (path,) = write(tmp_path, "a")
    assert cache.get(path, read) is cache.get(path, read)
    assert opened == ["a"]


def test_a_file_that_was_replaced_is_opened_again(tmp_path, read):
    cache = ArrayCache()
    (path,) = write(tmp_path, "a", text="old")
    cache.get(path, read)
    write(tmp_path, "b", text="new")[0].replace(path)
    assert cache.get(path, read) == "new"


def test_the_arrays_used_last_stay_open(tmp_path, opened, read):
    cache = ArrayCache(max_open=2)
    a, b, c = write(tmp_path, "a", "b", "c")
    for path in (a, b, a, c, a, b):
        cache.get(path, read)
    assert opened == ["a", "b", "c", "b"]


def test_nothing_is_kept_where_open_files_cannot_be_replaced(tmp_path, monkeypatch, opened, read):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    cache = ArrayCache()
    (path,) = write(tmp_path, "a")
    assert cache.get(path, read) == cache.get(path, read)
    assert opened == ["a", "a"]


def test_a_missing_file_is_reported_by_whoever_opens_it(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="gone"):
        ArrayCache().get(tmp_path / "gone", read)


def test_another_process_opens_its_own(tmp_path, opened, read):
    cache = ArrayCache()
    (path,) = write(tmp_path, "a")
    cache.get(path, read)
    pickle.loads(pickle.dumps(cache)).get(path, read)
    assert opened == ["a", "a"]
