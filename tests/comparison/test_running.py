"""Processes that an interrupted comparison has left behind, and models that predict alike."""

import os
import subprocess
import sys

import pytest
from patience import PATIENCE_S

from nnunetv2.comparison.running import stop_processes_of

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]


def start_sleeping(*words: str, **options) -> subprocess.Popen:
    return subprocess.Popen([*SLEEP, *words], stdout=subprocess.PIPE, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes work in a folder")
def test_what_works_in_an_interrupted_step_is_ended_and_who_looks_at_it_is_not(tmp_path):
    folder = tmp_path / "seed_0.1.unfinished"
    worker = start_sleeping(env={**os.environ, "nnUNet_results": str(folder)})
    coordinator = start_sleeping("nnUNetv2_fed_coordinator", "--folder", str(folder / "federation"))
    reader = start_sleeping(str(folder / "log.txt"), env={**os.environ, "PWD": str(folder)})
    try:
        for process in (worker, coordinator, reader):
            process.stdout.readline()  # it has begun, so the system shows its command and environment
        stop_processes_of(folder)
        assert worker.wait(PATIENCE_S) != 0 and coordinator.wait(PATIENCE_S) != 0
        assert reader.poll() is None
    finally:
        for process in (worker, coordinator, reader):
            process.kill()
            process.communicate()
