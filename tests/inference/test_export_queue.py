"""Tests of exporting in the background."""

from __future__ import annotations

import errno
import pickle
import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from patience import PATIENCE_S

from nnunetv2.inference.errors import FailedCasesError, NonFiniteLogitsError, UnpreparedCaseError
from nnunetv2.inference.export_queue import ExportQueue
from nnunetv2.inference.forward_budget import ForwardBudget
from nnunetv2.inference.tile_accumulation import predict_tiles


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


def test_cases_of_one_name_in_several_folders_are_all_listed():
    def export(output):
        if output != "/p4/seg":
            raise OSError("no permission")

    with ExportQueue(1) as queue:
        for output in ("/p1/seg", "/p2/seg", "/p3/other", "/p4/seg"):
            queue.submit(output, 1, export, output)
        with pytest.raises(FailedCasesError) as failure:
            queue.results()
    assert str(failure.value) == (
        "3 of 4 cases could not be predicted: /p1/seg: OSError: no permission; /p2/seg: OSError: no permission; "
        "other: OSError: no permission"
    )
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)


def test_cases_that_failed_hold_no_logits():
    def export(logits):
        raise PermissionError(errno.EACCES, "not writable", "liver")

    kept = []
    with ExportQueue(1, most_bytes=10**12) as queue:
        for number in range(5):
            logits = np.zeros((2, 50, 50))
            kept.append(weakref.ref(logits))
            queue.submit(str(number), logits.nbytes, export, logits)
            del logits
        with pytest.raises(FailedCasesError, match="5 of 5 cases") as failure:
            queue.results()
    assert len(failure.value.failures) == 5
    assert not any(reference() is not None for reference in kept)


def test_cases_with_logits_that_are_not_finite_hold_no_image():
    def predict(tiles):
        return torch.full((len(tiles), 2, *tiles.shape[2:]), float("nan"))

    kept = []
    with ExportQueue(1) as queue:
        for number in range(4):
            image = torch.zeros(1, 8, 8, 8)
            kept.append(weakref.ref(image))
            with pytest.raises(NonFiniteLogitsError) as caught:
                predict_tiles(
                    predict,
                    image,
                    [(slice(None), *[slice(0, 8)] * 3)],
                    classes=2,
                    weight=1.0,
                    device=torch.device("cpu"),
                    results_device=torch.device("cpu"),
                    tiles_at_once=lambda voxels: 1,
                    budget=ForwardBudget(0),
                    leave_device=lambda: predict,
                    advance=lambda tiles: None,
                )
            queue.fail(str(number), caught.value)
            del image, caught
        assert not any(reference() is not None for reference in kept)
        with pytest.raises(FailedCasesError, match="4 of 4 cases"):
            queue.results()


def test_exports_that_are_done_are_not_looked_at_again(monkeypatch):
    looked_at = 0
    done = Future.done

    def count(self):
        nonlocal looked_at
        looked_at += 1
        return done(self)

    monkeypatch.setattr(Future, "done", count)
    with ExportQueue(0) as queue:
        for number in range(300):
            queue.submit(str(number), 1, lambda: None)
        queue.results()
    assert looked_at < 10 * 300


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
