from nnunetv2.utilities.progress import follow

PAIRS = [("a", 1), ("b", 2)]


def test_a_bar_shows_cases_per_second_and_time_left(capsys):
    assert list(follow(iter(PAIRS), total=2, description="Working")) == PAIRS
    shown = capsys.readouterr().err
    assert "Working: 100%" in shown
    assert "2/2" in shown
    assert "cases/s" in shown


def test_lines_of_a_log_take_the_place_of_the_bar(capsys, caplog):
    caplog.set_level("INFO")
    assert list(follow(iter(PAIRS), total=2, description="Working", log_cases=True)) == PAIRS
    assert capsys.readouterr().err == ""
    first, last = caplog.messages
    assert first.startswith("Working: a done, 1 of 2, ")
    assert last.endswith("about 0 s left")


def test_nothing_is_shown_on_request(capsys, caplog):
    assert list(follow(iter(PAIRS), total=2, description="Working", show_bar=False)) == PAIRS
    assert capsys.readouterr().err == caplog.text == ""
