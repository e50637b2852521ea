"""Cases in worker processes."""
import os
import signal
import time

import pytest

from nnunetv2.experiment_planning.case_pool import CaseError, map_cases


def add(a, b):
    return a + b


def fail_for_odd(number):
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def fail_to_index(number):
    return [][number]


def die(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number > 2:
        time.sleep(30)
    return number


def fail_or_sleep(number):
    if number == 0:
        raise ValueError("broken")
    time.sleep(60)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_come_in_the_order_of_the_cases(num_processes):
    arguments = {f"case_{i}": (i, 10) for i in range(7)}
    assert map_cases(add, arguments, num_processes=num_processes, description="Adding",
                     show_progress=False) == [10, 11, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_failure_names_the_case(num_processes):
    with pytest.raises(CaseError, match="^case liver_001: 1 is odd$"):
        map_cases(fail_for_odd, {"liver_000": (0,), "liver_001": (1,), "liver_002": (2,)}, num_processes=num_processes,
                  description="Failing", show_progress=False)


def test_unusual_errors_are_named_by_their_type():
    with pytest.raises(CaseError, match="case a: IndexError: list index out of range"):
        map_cases(fail_to_index, {"a": (0,)}, num_processes=1, description="Failing", show_progress=False)


def test_dead_worker_is_noticed_and_its_case_named():
    start = time.monotonic()
    with pytest.raises(CaseError, match=r"exit code -9\) on case liver_2\. Most often the memory"):
        map_cases(die, {f"liver_{i}": (i,) for i in range(6)}, num_processes=2, description="Dying",
                  show_progress=False)
    assert time.monotonic() - start < 20


def test_first_failure_does_not_wait_for_the_rest():
    start = time.monotonic()
    with pytest.raises(CaseError, match="case a: broken"):
        map_cases(fail_or_sleep, {"a": (0,), "b": (1,)}, num_processes=2, description="Failing", show_progress=False)
    assert time.monotonic() - start < 20


def test_number_of_processes_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        map_cases(add, {}, num_processes=0, description="None", show_progress=False)
