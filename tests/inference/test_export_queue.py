"""Tests of exporting in the background."""

from __future__ import annotations

import errno
import threading

import pytest
from patience import PATIENCE_S

from nnunetv2.inference.export_queue import ExportQueue
from nnunetv2.inference.preprocessing_jobs import UnpreparedCaseError


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_results_keep_the_order_of_arrival(num_workers):
    with ExportQueue(num_workers) as queue:
        for number in range(20):
            queue.submit(f"case {number}", 1, lambda n: n * n, number)
        assert queue.results() == [number**2 for number in range(20)]


def test_a_failure_is_named_and_spares_the_other_cases(caplog):
    done = []

    def export(number):
        if number == 1:
            raise OSError("disk full")
        done.append(number)

    with ExportQueue(1) as queue:
        for number in range(4):
            queue.submit(f"liver_{number}", 1, export, number)
        with pytest.raises(RuntimeError, match="1 of 4 cases could not be predicted: liver_1: OSError: disk full"):
            queue.results()
    assert done == [0, 2, 3]
    assert "liver_1" in caplog.text


def test_lack_of_memory_is_called_by_its_old_name():
    def export():
        raise MemoryError

    with ExportQueue(1) as queue:
        queue.submit("liver", 1, export)
        with pytest.raises(RuntimeError, match=r"^Segmentation export worker died\."):
            queue.results()


def test_a_full_disk_ends_the_run():
    def export():
        raise OSError(errno.ENOSPC, "No space left on device")

    with ExportQueue(0) as queue:
        queue.submit("liver_1", 1, export)
        with pytest.raises(RuntimeError, match="liver_1: OSError: .*No space left"):
            queue.submit("liver_2", 1, export)


def test_cases_that_were_never_prepared_are_listed_with_the_others():
    with ExportQueue(1) as queue:
        queue.submit("liver_1", 1, lambda: 1)
        queue.fail("liver_2", UnpreparedCaseError("liver_2", "ValueError: no image"))
        with pytest.raises(RuntimeError, match=r"^1 of 2 cases .*: liver_2: ValueError: no"):
            queue.results()


def test_after_ctrl_c_nothing_is_waited_for():
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt), ExportQueue(1) as queue:
        queue.submit("running", 1, release.wait)
        queue.submit("waiting", 1, release.wait)
        raise KeyboardInterrupt
    release.set()


def test_without_workers_an_export_is_done_when_submit_returns():
    done = []
    with ExportQueue(0) as queue:
        queue.submit("case", 1, done.append, 1)
        assert done == [1]


@pytest.mark.slow
@pytest.mark.parametrize(("num_bytes", "at_once"), [(1, 3), (3, 1)])
def test_waiting_logits_are_bounded_in_number_and_bytes(num_bytes, at_once):
    release, submitted = threading.Event(), []

    def submit_all(queue):
        for number in range(5):
            queue.submit("case", num_bytes, release.wait)
            submitted.append(number)

    with ExportQueue(1, most_bytes=5) as queue:
        producer = threading.Thread(target=submit_all, args=(queue,))
        producer.start()
        producer.join(0.3)
        assert len(submitted) == at_once
        release.set()
        producer.join(PATIENCE_S)
        assert len(submitted) == 5


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        ExportQueue(-1)
