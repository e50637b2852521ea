"""How long the rounds of a run take."""

from nnunetv2.federated.exchanges.pace import time_left, typical_duration


def test_durations_and_remaining_time():
    assert typical_duration([]) is typical_duration([1.0]) is None
    assert typical_duration([0.0, 10.0, 110.0, 120.0]) == 10.0
    assert time_left(3, 10.0, 4.0) == 26.0 and time_left(3, 10.0, 400.0) == 20.0
