import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from preprocessing_scans import NAME, make_case, write_image, write_plans, write_raw_dataset

from nnunetv2.errors import FolderInUseError
from nnunetv2.preprocessed_data.journal import PreprocessingJournal, journal_path, read_header
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.case_workers import CaseFailedError

MADE_FROM = {"plans": "a", "the code": "b"}


@pytest.fixture
def sources(tmp_path):
    files = {}
    for case in ("liver_1", "liver_10", "liver_2"):
        file = tmp_path / f"{case}_0000.nrrd"
        file.write_text(case)
        files[case] = [str(file)]
    return files


def finish(folder: Path, case: str) -> None:
    for ending in ("_seg.b2nd", ".pkl", ".b2nd"):
        (folder / f"{case}{ending}").write_text(ending)


def make_finished(folder: Path, sources, *cases: str) -> None:
    with PreprocessingJournal(folder, MADE_FROM) as finished:
        for case in cases:
            finish(folder, case)
            finished.add(case, sources[case])


def remaining(folder: Path, sources, made_from=MADE_FROM) -> list[str]:
    with PreprocessingJournal(folder, made_from) as finished:
        return finished.remaining(sources)


def test_finished_cases_are_not_done_again(tmp_path, sources):
    folder = tmp_path / "data"
    assert remaining(folder, sources) == ["liver_1", "liver_10", "liver_2"]
    make_finished(folder, sources, "liver_10")
    assert remaining(folder, sources) == ["liver_1", "liver_2"]
    assert (folder / "liver_10.b2nd").is_file()


def test_halves_of_cases_and_strangers_are_removed(tmp_path, sources):
    folder = tmp_path / "data"
    make_finished(folder, sources, "liver_1")
    finish(folder, "liver_2")  # complete, but nobody said so
    (folder / "liver_10_seg.b2nd").touch()
    (folder / ".partial-x").mkdir()
    (folder / "left_over.npz").touch()
    remaining(folder, sources)
    assert sorted(path.name for path in folder.iterdir()) == ["liver_1.b2nd", "liver_1.pkl", "liver_1_seg.b2nd"]


@pytest.mark.parametrize("made_from", [{"plans": "z", "the code": "b"}, {"plans": "a"}, {}])
def test_nothing_is_reused_once_plans_or_code_change(tmp_path, sources, made_from, caplog):
    folder = tmp_path / "data"
    make_finished(folder, sources, "liver_1")
    caplog.set_level("INFO")
    assert len(remaining(folder, sources, made_from)) == 3
    assert list(folder.iterdir()) == []
    assert "is made anew" in caplog.text


def test_changed_source_files_are_read_again(tmp_path, sources):
    folder = tmp_path / "data"
    make_finished(folder, sources, "liver_1", "liver_2")
    Path(sources["liver_2"][0]).write_text("another scan")
    assert remaining(folder, sources) == ["liver_10", "liver_2"]
    assert not (folder / "liver_2.b2nd").exists()


@pytest.mark.parametrize("seconds", [-86400, 0, 86400])
def test_a_source_of_equal_size_is_read_again_whatever_its_time(tmp_path, sources, seconds):
    folder, file = tmp_path / "data", Path(sources["liver_2"][0])
    os.utime(file, (1_600_000_000,) * 2)
    make_finished(folder, sources, *sources)
    file.write_text("LIVER_2")
    os.utime(file, (1_600_000_000 + seconds,) * 2)
    assert remaining(folder, sources) == ["liver_2"]


def test_a_source_that_was_moved_back_and_forth_is_the_same(tmp_path, sources):
    folder, file = tmp_path / "data", Path(sources["liver_2"][0])
    make_finished(folder, sources, *sources)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("liver_2")
    os.utime(file, ns=times)
    assert remaining(folder, sources) == []
    before = journal_path(folder).read_bytes()
    assert remaining(folder, sources) == []
    assert journal_path(folder).read_bytes() == before  # the new time of change was noted


def test_a_source_that_appears_or_goes_makes_the_case_anew(tmp_path, sources):
    folder, side_car = tmp_path / "data", tmp_path / "liver_2.json"
    sources["liver_2"].append(str(side_car))
    make_finished(folder, sources, *sources)
    assert remaining(folder, sources) == []
    side_car.write_text("spacing")
    assert remaining(folder, sources) == ["liver_2"]
    make_finished(folder, sources, "liver_2")
    side_car.unlink()
    assert remaining(folder, sources) == ["liver_2"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("shorter")])
def test_damaged_results_are_made_anew(tmp_path, sources, damage):
    folder = tmp_path / "data"
    make_finished(folder, sources, *sources)
    damage(folder / "liver_2.pkl")
    assert remaining(folder, sources) == ["liver_2"]


def test_half_a_line_is_cut_off(tmp_path, sources):
    folder = tmp_path / "data"
    make_finished(folder, sources, "liver_1", "liver_2")
    journal = journal_path(folder)
    journal.write_bytes(journal.read_bytes()[:-20])
    assert remaining(folder, sources) == ["liver_10", "liver_2"]
    make_finished(folder, sources, "liver_2")
    assert remaining(folder, sources) == ["liver_10"]
    assert [json.loads(line).get("case") for line in journal.read_text().splitlines()] == [None, "liver_1", "liver_2"]


@pytest.mark.parametrize("nonsense", [b"", b"{}\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_journal_of_nonsense_is_worth_nothing(tmp_path, sources, nonsense):
    folder = tmp_path / "data"
    make_finished(folder, sources, "liver_1")
    journal_path(folder).write_bytes(nonsense)
    assert len(remaining(folder, sources)) == 3


def test_two_runs_do_not_meet_in_one_folder(tmp_path, sources):
    folder = tmp_path / "data"
    with (
        PreprocessingJournal(folder, MADE_FROM),
        pytest.raises(FolderInUseError, match="another process"),
        PreprocessingJournal(folder, MADE_FROM),
    ):
        pass
    remaining(folder, sources)  # the first is over


def test_all_cases_are_done_again_once_the_folder_is_removed(tmp_path, sources):
    folder = tmp_path / "data"
    make_finished(folder, sources, *sources)
    shutil.rmtree(folder)
    assert len(remaining(folder, sources)) == 3


def test_others_can_ask_what_the_cases_were_made_from(tmp_path, sources):
    folder = tmp_path / "data"
    assert read_header(folder) is None
    make_finished(folder, sources, "liver_1")
    assert read_header(folder)["made_from"] == MADE_FROM
    journal_path(folder).write_bytes(b"nonsense")
    assert read_header(folder) is None


# ------------------------------------------------------------------------------------------------ whole runs


class Counting(DefaultPreprocessor):
    """Notes which cases it is asked to do. The list is none of its settings, so it is kept at the class."""

    done: list[str] = []

    def run_case_save(self, output_filename_truncated, *arguments):
        self.done.append(Path(output_filename_truncated).name)
        super().run_case_save(output_filename_truncated, *arguments)


@pytest.fixture
def cases_done_by_run(roots, monkeypatch):
    def run(**settings):
        monkeypatch.setattr(Counting, "done", [])
        preprocessor = Counting(verbose=False)
        preprocessor.show_progress_bar = False
        vars(preprocessor).update(settings)
        preprocessor.run(987, "3d_fullres", "nnUNetPlans", 1)
        return Counting.done

    return run


def test_a_second_run_does_what_is_new(roots, cases_done_by_run):
    write_raw_dataset(roots)
    assert cases_done_by_run() == ["case_0", "case_1", "case_2"]
    assert cases_done_by_run() == []
    write_image(make_case(9)[0][0] + 1, roots["nnUNet_raw"] / NAME / "imagesTr" / "case_1_0000.nii.gz")
    assert cases_done_by_run() == ["case_1"]


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": (2.0, 1.0, 1.0)},
        {"use_mask_for_norm": [True]},
        {"patch_size": [8, 8, 8]},
        {"setting_of_a_user": 1},
        {"transpose": (0, 2, 1)},
    ],
)
def test_other_plans_mean_other_cases(roots, cases_done_by_run, change):
    write_raw_dataset(roots, cases=2)
    cases_done_by_run()
    write_plans(roots, **change)
    assert cases_done_by_run() == ["case_0", "case_1"]


def test_plans_that_differ_in_their_network_only_share_cases(roots, cases_done_by_run):
    write_raw_dataset(roots, cases=1)
    cases_done_by_run()
    write_plans(roots, architecture={"network_class_name": "Another"}, batch_size=7)
    assert cases_done_by_run() == []


def test_settings_of_a_preprocessor_count(roots, cases_done_by_run):
    write_raw_dataset(roots, cases=1)
    cases_done_by_run(threshold=1)
    assert cases_done_by_run(threshold=2) == ["case_0"]
    assert cases_done_by_run(threshold=2) == []


def test_another_dataset_json_means_other_cases(roots, cases_done_by_run):
    write_raw_dataset(roots, cases=1)
    cases_done_by_run()
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        file = roots[folder] / NAME / "dataset.json"
        file.write_text(file.read_text().replace('"core": 2', '"core": 2, "ignore": 3'))
    assert cases_done_by_run() == ["case_0"]


class Dying(DefaultPreprocessor):
    """Its worker is killed with one case, as by a system that is short of memory."""

    def run_case_save(self, output_filename_truncated, *arguments):
        marker = Path(output_filename_truncated).parents[1] / "die"
        if output_filename_truncated.endswith("case_1") and marker.is_file():
            os.kill(os.getpid(), signal.SIGKILL)
        super().run_case_save(output_filename_truncated, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_dead_worker_costs_its_case_only(roots):
    folder = write_raw_dataset(roots, cases=4)
    (folder.parent / "die").touch()
    preprocessor = Dying(verbose=False)
    preprocessor.show_progress_bar = False
    with pytest.raises(CaseFailedError, match="case case_1: the worker process was killed .* memory ran out"):
        preprocessor.run(987, "3d_fullres", "nnUNetPlans", 2)
    assert not list(folder.glob("case_1*"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    (folder.parent / "die").unlink()
    preprocessor.run(987, "3d_fullres", "nnUNetPlans", 2)
    assert len(list(folder.iterdir())) == 12
    finished = [json.loads(line).get("case") for line in journal_path(folder).read_text().splitlines()]
    assert sorted(filter(None, finished)) == [f"case_{i}" for i in range(4)]  # none of them twice
    assert before.keys() <= {path.name for path in folder.iterdir()}


def test_a_full_disk_leaves_no_half_of_a_case(roots, monkeypatch):
    from nnunetv2.preprocessed_data import datasets

    folder = write_raw_dataset(roots, cases=2)
    save_pickle = datasets.save_pickle

    def fail_for_case_1(properties, path):
        if "case_1" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_pickle(properties, path)

    monkeypatch.setattr(datasets, "save_pickle", fail_for_case_1)
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    with pytest.raises(CaseFailedError, match="case case_1: OSError.*No space left"):
        preprocessor.run(987, "3d_fullres", "nnUNetPlans", 1)
    assert sorted(path.name for path in folder.iterdir()) == ["case_0.b2nd", "case_0.pkl", "case_0_seg.b2nd"]
