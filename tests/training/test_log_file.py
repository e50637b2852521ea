from datetime import datetime
from pathlib import Path

import pytest

from nnunetv2.training import log_file


def test_year_month_and_day_are_not_padded():
    assert log_file.log_file_name(datetime(2025, 3, 7, 4, 5, 6)) == "training_log_2025_3_7_04_05_06.txt"


def test_every_argument_is_followed_by_a_space():
    assert log_file.format_log_line(("val_loss", -0.5), None) == "val_loss -0.5 "
    assert log_file.format_log_line(("x",), datetime(2025, 3, 7)) == "2025-03-07 00:00:00: x "


def test_a_new_log_begins_with_its_header(tmp_path):
    for line in ("one", "two"):
        log_file.append_to_log(tmp_path / "log.txt", line, header="header")
    assert (tmp_path / "log.txt").read_text() == "header\none\ntwo\n"


def test_a_disk_that_stays_away_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "PAUSE_S", 0)
    with pytest.raises(FileNotFoundError):
        log_file.append_to_log(tmp_path / "missing" / "log.txt", "one", header="")


def test_names_of_others_do_not_command_whoever_reads_a_log():
    assert log_file.format_log_line(("Plans:\n{'x\x1b[2K': 1}", "\u202e"), None) == "Plans:\n{'x\\x1b[2K': 1} \\u202e "


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_names_the_log(monkeypatch):
    monkeypatch.setattr(log_file, "PAUSE_S", 0.0)
    with pytest.raises(OSError, match="/dev/full"):
        log_file.append_to_log(Path("/dev/full"), "text", header="header")
