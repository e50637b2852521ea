"""Keep the first lines of docstrings in form: a sentence of a few words that begins with no question word."""

import pytest
from docstrings import MOST_WORDS, PROJECT, Docstring, describe_fault, read_docstrings, whats_per_thousand_words


@pytest.mark.slow
def test_first_lines_are_in_form():
    faults = [
        f"{one.file}: {one.name}: {fault}: {one.first_line}"
        for one in read_docstrings(PROJECT / "nnunetv2")
        if (fault := describe_fault(one))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Return the size of each output.", None),
        ("Return the size\nof each output.\n\nMore of it, at any length", None),
        ("What to return.", "begins with a question word"),
        ("Return the size", "does not end with a period"),
        ("word " * MOST_WORDS + "word.", f"has {MOST_WORDS + 1} words"),
    ],
)
def test_faults_of_a_first_line(text, fault):
    assert describe_fault(Docstring("a.py", "f", text)) == fault


def test_whats_are_counted_in_whole_docstrings():
    assert whats_per_thousand_words([Docstring("a.py", "", "What a day."), Docstring("a.py", "f", "No")]) == 250
