"""Durations, for people."""

import pytest

from nnunetv2.utilities.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (72, "1 min 12 s"),
        (720, "12 min"),
        (3600, "1 h"),
        (4320, "1 h 12 min"),
        (36_000, "10 h"),
        (90_000, "1 d 1 h"),
        (9_000_000, "104 d"),
        (59.6, "1 min"),
        (754, "12 min"),
        (195_123, "2 d 6 h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text
