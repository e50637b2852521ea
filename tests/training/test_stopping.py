import os
import signal
import threading

import pytest

from nnunetv2.training import stopping
from nnunetv2.training.stopping import StopConditions, epochs_without_best, holding_back, listening, request_stop

NAN = float("nan")


def make_conditions(tmp_path, **options):
    return StopConditions(tmp_path, holder="process 1 on here", started=100.0, **options)


def test_without_wishes_nothing_ends_a_training(tmp_path):
    conditions = make_conditions(tmp_path)
    assert [conditions.reason([0.1] * epoch, now=1e6 * epoch) for epoch in range(5)] == [None] * 5


def test_no_epoch_begins_that_would_end_too_late(tmp_path):
    conditions = make_conditions(tmp_path, stop_after_s=60.0)
    assert conditions.reason([], now=110.0) is None  # nobody knows yet how long an epoch takes
    assert conditions.reason([0], now=130.0) is None  # 20 s, 30 s are left
    assert "10 s are left, and the latest epoch took 20 s" in conditions.reason([0, 0], now=150.0)


def test_a_first_epoch_is_trained_however_late_it_is(tmp_path):
    conditions = make_conditions(tmp_path, stop_after_s=1.0)
    assert conditions.reason([0.5], now=200.0) is None
    assert "0 s are left" in conditions.reason([0.5, 0.5], now=201.0)


@pytest.mark.parametrize(
    ("curve", "since"),
    [([], 0), ([0.5], 0), ([0.5, 0.5], 1), ([0.1, 0.3, 0.2, 0.25], 2), ([NAN, NAN], 2), ([NAN, 0.1, NAN], 1)],
)
def test_epochs_since_the_best_are_counted(curve, since):
    assert epochs_without_best(curve) == since


def test_patience_ends_with_so_many_epochs_without_a_better_one(tmp_path):
    conditions = make_conditions(tmp_path, patience=2)
    assert conditions.reason([0.1, 0.3, 0.2], now=0) is None
    assert "--early_stopping: 2 epochs" in conditions.reason([0.1, 0.3, 0.2, 0.3], now=0)


def test_a_request_counts_for_the_training_that_it_names(tmp_path):
    conditions = make_conditions(tmp_path)
    request_stop(tmp_path, "process 2 on here")
    assert conditions.reason([], now=0) is None
    request_stop(tmp_path, "process 1 on here")
    assert conditions.reason([], now=0) == "nnUNetv2_stop"
    conditions.forget_request()
    conditions.forget_request()
    assert conditions.reason([], now=0) is None and not list(tmp_path.iterdir())


def test_a_signal_is_noted_while_somebody_listens_and_what_it_did_before_is_restored(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with listening():
        assert not stopping.was_signalled()
        os.kill(os.getpid(), signal.SIGUSR1)
        with listening():
            assert stopping.was_signalled()
        assert make_conditions(tmp_path).reason([], now=0) == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before
    assert not stopping.was_signalled()  # the next training of a program is another one


def test_a_signal_that_was_held_back_comes_when_somebody_listens():
    with holding_back():
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # would end this process
        with listening():
            assert stopping.was_signalled()
