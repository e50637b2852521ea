"""Tests of how a command ends after Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from patience import PATIENCE_S

from nnunetv2.inference.interruption import run_until_interrupted

DEAF = """
import sys, time
from nnunetv2.inference import interruption

interruption._SECONDS_TO_STOP = 0.5

def command():
    for _ in range(3):
        try:
            print("ready", flush=True)  # the interrupt may come before this returns
            time.sleep(10_000)
        except KeyboardInterrupt:  # as destructors and callbacks of C code do
            pass

interruption.run_until_interrupted(command)
"""


def test_handlers_are_as_before_afterwards():
    before, seen = signal.getsignal(signal.SIGINT), []
    run_until_interrupted(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    assert seen != [before]
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_the_program_stay(monkeypatch):
    before, seen = signal.getsignal(signal.SIGINT), []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_until_interrupted(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_command_that_loses_the_interrupt_is_ended():
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    process.stdout.close()
