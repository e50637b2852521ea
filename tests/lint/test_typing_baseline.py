"""Tests of the comparison of mypy's report with the baseline."""

from collections import Counter

import pytest
from typing_baseline import count_errors, describe_growth, format_baseline, main, read_baseline

REPORT = """a/b.py:3: error: Incompatible return value type  [return-value]
a/b.py:3: note: See https://example.org
a/c.py:7: error: No  [misc]
a/b.py:9: error: No  [misc]
Found 3 errors in 2 files (checked 4 source files)
"""


def test_errors_are_counted_per_file():
    assert count_errors(REPORT) == Counter({"a/b.py": 2, "a/c.py": 1})


def test_a_baseline_is_read_as_it_was_written():
    counts = count_errors(REPORT)
    assert format_baseline(counts) == "2 a/b.py\n1 a/c.py\n"
    assert read_baseline(format_baseline(counts)) == counts


def test_all_errors_of_a_file_with_more_are_shown():
    shown = describe_growth(REPORT, Counter({"a/b.py": 1, "a/c.py": 1}))
    assert [line.partition(" ")[0] for line in shown] == ["a/b.py:3:", "a/b.py:9:"]
    assert not describe_growth(REPORT, Counter({"a/b.py": 2, "a/c.py": 9}))


@pytest.mark.parametrize(
    ("baseline", "options", "status", "written"),
    [
        ("2 a/b.py\n1 a/c.py\n", [], 0, "2 a/b.py\n1 a/c.py\n"),
        ("1 a/b.py\n1 a/c.py\n", [], 1, "1 a/b.py\n1 a/c.py\n"),
        ("5 a/old.py\n", ["--update"], 0, "2 a/b.py\n1 a/c.py\n"),
        ("2 a/b.py\n", ["--update"], 1, "2 a/b.py\n"),
    ],
)
def test_a_baseline_only_shrinks(monkeypatch, tmp_path, baseline, options, status, written):
    path = tmp_path / "baseline.txt"
    path.write_text(baseline)
    monkeypatch.setattr("typing_baseline.BASELINE", path)
    monkeypatch.setattr("typing_baseline.run_mypy", lambda: REPORT)
    assert main(options) == status
    assert path.read_text() == written
