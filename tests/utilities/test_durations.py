"""Durations, for people."""

import pytest

from nnunetv2.utilities.durations import format_duration, parse_duration


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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("90 min", 5400), ("1h30m", 5400), ("1d 2h", 93_600), ("0.5h", 1800), ("45s", 45)],
)
def test_typed_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "", "m", "1x", "1h30", "-1h", "1.2.3h", "1h,5m", "01:30:00"])
def test_durations_without_units_are_refused(text):
    with pytest.raises(ValueError, match="90m or 1h30m"):
        parse_duration(text)
