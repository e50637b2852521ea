import io

import pytest

from nnunetv2.training.progress_line import CLEAR_LINE, Position, ProgressLine, format_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Advances by a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_the_line_tells_what_is_known():
    position = Position(12, 1000, "training", 250, 137)
    assert format_progress(position, loss=-0.43117, dice=0.8123, seconds_per_iteration=0.2, seconds_left=754) == (
        "Epoch 12/1000  training 137/250  loss -0.4312  pseudo Dice 0.8123  0.20 s/it  12 min left"
    )
    assert format_progress(position, loss=None, dice=None, seconds_per_iteration=None, seconds_left=None) == (
        "Epoch 12/1000  training 137/250"
    )


def test_a_terminal_shows_each_iteration_and_is_cleared():
    stream = Terminal()
    line = ProgressLine(stream, Clock())
    line.start_epoch()
    assert list(line.count(Position(0, 2, "training", 3), loss=lambda: 0.5, dice=None)) == [0, 1, 2]
    line.end_epoch()
    shown = stream.getvalue().split(CLEAR_LINE)
    assert [text.split("  ")[1] for text in shown[1:4]] == [f"training {n}/3" for n in (1, 2, 3)]
    assert shown[-1] == "" and "left" in shown[1]


def test_nothing_is_written_and_no_loss_fetched_without_a_terminal():
    def loss():
        raise AssertionError("the loss was fetched")

    for line in (ProgressLine(io.StringIO(), Clock()), ProgressLine(Terminal(), Clock(), is_enabled=False)):
        assert len(list(line.count(Position(0, 1, "training", 3), loss=loss, dice=None))) == 3
        line.end_epoch()
        assert line.stream.getvalue() == ""


def test_whole_epochs_tell_how_long_the_others_take():
    clock = Clock()
    line = ProgressLine(Terminal(), clock)
    line.start_epoch()
    clock.now += 99
    line.end_epoch()
    line.start_epoch()
    assert line._seconds_left(Position(1, 4, "training", 10, 9), pace=1.0) == pytest.approx(300, abs=2)
