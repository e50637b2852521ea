"""A run that is killed at any moment goes on when it is started again, and ends with the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S
from preprocessing_scans import write_raw_dataset

from nnunetv2.preprocessed_data.journal import journal_path

RUN = """
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
if __name__ == "__main__":
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(987, "3d_fullres", "nnUNetPlans", 2)
"""
SHAPE = (70, 100, 110)
CASES = 10


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, script], cwd=tmp_path, start_new_session=True)

    return start


def digest_files(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".partial-")
    }


def visible_cases(folder: Path) -> set[str]:
    """What training would take for a case: an image that is not a segmentation."""
    return {path.name.removesuffix(".b2nd") for path in folder.glob("*.b2nd") if not path.name.endswith("_seg.b2nd")}


def cases_in_journal(folder: Path) -> list[str]:
    _, *lines = journal_path(folder).read_text().split("\n")
    return [json.loads(line)["case"] for line in lines[:-1]]  # what follows the last line break is half a line


def wait_for_cases(process: subprocess.Popen, folder: Path, more_than: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and len(visible_cases(folder)) <= more_than:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: subprocess.Popen, with_workers: bool) -> None:
    if process.poll() is None:  # on a busy machine it may be over already
        if with_workers:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # the workers have to notice
    process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals")
def test_a_run_killed_five_times_ends_with_the_bytes_of_an_undisturbed_one(roots, start):
    folder = write_raw_dataset(roots, cases=CASES, shape=SHAPE)
    assert start().wait() == 0
    undisturbed = digest_files(folder)
    assert len(undisturbed) == 3 * CASES
    folder.rename(folder.with_name("undisturbed"))

    rng = random.Random(0)
    kept = {}
    for attempt in range(5):
        process = start()
        wait_for_cases(process, folder, more_than=len(kept))
        time.sleep(rng.uniform(0, 0.3))
        kill(process, with_workers=attempt % 2 == 0)
        found = digest_files(folder)
        for name in (f"{case}{ending}" for case in visible_cases(folder) for ending in (".b2nd", "_seg.b2nd", ".pkl")):
            assert found[name] == undisturbed[name]  # none of them is half written
        for path, time_of_change in kept.items():
            assert path.stat().st_mtime_ns == time_of_change  # and what was finished was not done again
        kept = {
            folder / f"{case}.b2nd": (folder / f"{case}.b2nd").stat().st_mtime_ns for case in cases_in_journal(folder)
        }
    assert start().wait() == 0
    assert digest_files(folder) == undisturbed
    assert not list(folder.glob(".*"))
