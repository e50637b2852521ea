"""Results of many cases."""

import time

import pytest
from patience import MUCH_LONGER_S

from nnunetv2.utilities.case_workers import CaseFailedError
from nnunetv2.utilities.map_cases import map_cases_visibly


def wait_and_return(seconds, value):
    time.sleep(seconds)
    return value


def fail_or_sleep(number):
    if number == 0:
        raise ValueError("broken")
    time.sleep(MUCH_LONGER_S)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_come_in_the_order_of_the_cases(num_processes):
    cases = {f"case_{i}": (0.2 if i == 0 else 0, i) for i in range(7)}
    assert map_cases_visibly(
        wait_and_return, cases, num_processes=num_processes, description="Waiting", show_progress=False
    ) == list(range(7))


def test_first_failure_does_not_wait_for_the_rest():
    with pytest.raises(CaseFailedError, match="case a: ValueError: broken"):
        map_cases_visibly(
            fail_or_sleep, {"a": (0,), "b": (1,)}, num_processes=2, description="Failing", show_progress=False
        )
