"""Processes that an interrupted comparison has left behind, and models that predict alike."""

import os
import subprocess
import sys

import pytest

from nnunetv2.comparison.running import stop_processes_of

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which processes work in a folder")
def test_what_works_in_an_interrupted_step_is_ended_and_who_looks_at_it_is_not(tmp_path):
    folder = tmp_path / "seed_0.1.unfinished"
    worker = subprocess.Popen(SLEEP, env={**os.environ, "nnUNet_results": str(folder)})
    coordinator = subprocess.Popen([*SLEEP, "nnUNetv2_fed_coordinator", "--folder", str(folder / "federation")])
    reader = subprocess.Popen([*SLEEP, str(folder / "log.txt")])
    try:
        stop_processes_of(folder)
        assert worker.wait(10) != 0 and coordinator.wait(10) != 0
        assert reader.poll() is None
    finally:
        for process in (worker, coordinator, reader):
            process.kill()
            process.wait()
