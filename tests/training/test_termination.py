"""A last word before SIGTERM ends a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S

from nnunetv2.training.nnUNetTrainer.variants.federated.termination import before_termination

PROJECT = Path(__file__).resolve().parents[2]
START = """
    import os, signal, sys, time
    from nnunetv2.training.nnUNetTrainer.variants.federated.termination import before_termination

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10_000)
"""


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(script)],
        timeout=PATIENCE_S,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def test_a_process_ends_by_the_signal_after_its_last_word():
    done = run("""
        with before_termination(lambda: print("last word", flush=True)):
            terminate()
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "last word\n")


def test_a_handler_that_was_there_is_called_afterwards():
    done = run("""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
        with before_termination(lambda: print("last word", flush=True)):
            terminate()
    """)
    assert (done.returncode, done.stdout) == (7, "last word\n")


def test_a_second_signal_does_not_wait_for_the_last_word():
    done = run("""
        with before_termination(terminate):
            terminate()
    """)
    assert done.returncode == -signal.SIGTERM


def test_a_worker_that_is_ended_says_nothing():
    done = run("""
        with before_termination(lambda: print("last word", flush=True)):
            worker = os.fork()
            if worker == 0:
                time.sleep(10_000)
                os._exit(0)
            time.sleep(0.2)
            os.kill(worker, signal.SIGTERM)
            print(os.waitpid(worker, 0)[1], flush=True)
    """)
    assert (done.returncode, done.stdout) == (0, f"{signal.SIGTERM:d}\n")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_what_was_there_before_is_there_afterwards(before):
    original = signal.signal(signal.SIGTERM, before)
    try:
        with before_termination(lambda: None):
            assert (signal.getsignal(signal.SIGTERM) is before) is (before is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, original)


def test_other_threads_leave_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def look():
        with before_termination(lambda: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(PATIENCE_S)
    assert found == [before]
