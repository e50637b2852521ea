"""Text of others on a terminal: every character is seen, none commands anything, and plain text stays as it is."""

import argparse
import ast
import io
import json
import logging
import shlex
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import nnunetv2
from nnunetv2.utilities.plain_text import PlainTextFormatter, printable, printable_json, shell_command, show

HOSTILE = "a\x1b]0;owned\x07\x1b[2K\rb\x9b31m\u202ec\u2066\u200b\u2028\u2029\u00a0\ud800\ue000\U000e0041\n\td\x7f\u3164"
EVERYTHING = "".join(map(chr, range(sys.maxunicode + 1)))


def is_harmless(text, *, allowed=""):
    """Tell whether a text has no control, format, surrogate, private, unassigned or separating character."""
    return all(
        one in allowed
        or (
            unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
            and (one == " " or unicodedata.category(one) != "Zs")
        )
        for one in text
    )


# ------------------------------------------------------------------------------------------------------- printable
@pytest.mark.slow
def test_no_character_of_unicode_stays_unseen():
    assert is_harmless(printable(EVERYTHING))
    assert is_harmless(printable(EVERYTHING, lines=True), allowed="\n")


def test_every_other_character_stays_as_it_is():
    for character in EVERYTHING:
        if character not in "\n\r\t" and character.isprintable() and printable(character) != character:
            assert unicodedata.name(character).split()[0] in (
                "COMBINING",
                "HANGUL",
                "HALFWIDTH",
                "KHMER",
                "MONGOLIAN",
                "BRAILLE",
                "VARIATION",
            ), character


@pytest.mark.parametrize(
    "text",
    [
        "",
        "liver",
        "Prüfung für Köln",
        "肝臓の腫瘍",
        "الكبد",
        "опухоль",
        "🫀 and ❤️",
        r"C:\data\x1b",
        "naïve e\u0301",
        "a 'quoted' \"word\" & more; $HOME `ls`",
    ],
)
def test_ordinary_text_stays(text):
    assert printable(text) == printable(text, lines=True) == text


def test_what_is_escaped_is_not_escaped_again():
    once = printable(HOSTILE)
    assert is_harmless(once)
    assert once.startswith(r"a\x1b]0;owned\x07\x1b[2K b\x9b31m\u202ec")
    assert printable(once) == once
    assert printable(printable(HOSTILE, lines=True), lines=True) == printable(HOSTILE, lines=True)


def test_line_breaks_are_kept_for_text_of_our_own_only():
    assert printable("one\ntwo\r\nthree\rfour\tfive") == "one two  three four five"
    assert printable("one\ntwo\r\nthree\rfour\tfive", lines=True) == "one\ntwo\nthree four five"


def test_what_is_too_long_is_cut_after_it_was_escaped():
    assert printable("\u202e" * 8000, most=20) == r"\u202e\u202e\u202..."
    assert printable("x" * 20, most=20) == "x" * 20
    assert printable("x" * 21, most=20) == "x" * 17 + "..."
    assert printable(ValueError("a\nb"), most=20) == "a b"


def test_random_text_is_harmless_and_settles_at_once():
    rng = np.random.default_rng(5)
    for _ in range(300):
        text = "".join(map(chr, rng.choice([*range(0x250), *range(0x2000, 0x2070), 0xFEFF, 0xE0001, 0x3164], 40)))
        assert is_harmless(printable(text)) and printable(printable(text)) == printable(text)


# ------------------------------------------------------------------------------------------------------------ JSON
def test_json_is_harmless_and_means_the_same():
    value = {HOSTILE.replace("\ud800", ""): ["für", 1.5, None], "emoji": "\U0001f600\U000e0041"}
    for text in (printable_json(value), printable_json(value, indent=4)):
        assert is_harmless(text, allowed="\n") and "für" in text
        assert json.loads(text) == value
    assert json.loads(printable_json("\ud800")) == "\ud800"


# ------------------------------------------------------------------------------------------------------------ show
def test_each_text_is_shown_on_one_line(capsys):
    show("one\nforged", HOSTILE, 3)
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4 and lines[0] == "one forged" and lines[2:] == ["3", ""]
    assert all(map(is_harmless, lines))


def test_what_a_terminal_cannot_write_is_escaped():
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    show("für 肝", file=file)
    file.flush()
    assert file.buffer.getvalue() == "für \\u809d\n".encode("latin-1")


@pytest.mark.slow
def test_the_package_prints_through_one_function():
    """`print` writes what it is given: names of others would reach the terminal as they are."""
    folder = Path(nnunetv2.__file__).parent
    printing = [
        f"{file.relative_to(folder)}:{node.lineno}"
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print" and file.name != "plain_text.py"
    ]
    assert printing == []


# ------------------------------------------------------------------------------------------------------------- log
def test_a_log_shows_placeholders_on_one_line_and_keeps_lines_of_its_own():
    record = logging.LogRecord(
        "x",
        logging.INFO,
        __file__,
        1,
        "ours\nalso ours: %s, %s, %.1f",
        ("label\nWARNING: forged\x1b[2K", ValueError("a\nb"), 1.25),
        None,
    )
    assert (
        PlainTextFormatter("%(message)s").format(record) == "ours\nalso ours: label WARNING: forged\\x1b[2K, a b, 1.2"
    )


def test_a_log_shows_tracebacks_without_commands_to_the_terminal():
    try:
        raise KeyError(HOSTILE) from ValueError(HOSTILE)
    except KeyError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "closing %s", ("x",), sys.exc_info())
    text = PlainTextFormatter().format(record)
    assert is_harmless(text, allowed="\n") and text.startswith("closing x\nValueError: a") and "Traceback" in text


# -------------------------------------------------------------------------------------------------------- commands
def test_a_command_without_odd_words_is_not_quoted():
    assert (
        shell_command("nnUNetv2_train", "Dataset001_A", "2d", 0, options=[("-p", "Plans"), ("--npz", None)])
        == "nnUNetv2_train Dataset001_A 2d 0 -p Plans --npz"
    )
    assert shell_command("x", options=[("-f", 0), ("-f", 1), ("-c", "2d")]) == "x -f 0 1 -c 2d"


@pytest.mark.parametrize(
    "word", ["a; touch pwned #", "$(id)", "`id`", "a b", "a'b", 'a"b', "", "!x", "~", "*", "-x", "--help", "-"]
)
def test_a_word_stays_one_word_and_never_becomes_an_option(word):
    parser = argparse.ArgumentParser()
    parser.add_argument("word")
    parser.add_argument("-c")
    parser.add_argument("-f", nargs="+")
    arguments = parser.parse_args(shlex.split(shell_command("x", word, options=[("-f", 1), ("-c", word)]))[1:])
    assert (arguments.word, arguments.c, arguments.f) == (word, word, ["1"])


def test_a_path_that_begins_like_an_option_is_written_as_a_path():
    assert shell_command("x", Path("-y.zip")) == "x ./-y.zip"
    assert shell_command("x", Path("a b.zip")) == "x 'a b.zip'"


def test_a_command_shows_what_cannot_be_seen():
    assert shell_command("x", "a\x1b[2K") == r"x 'a\x1b[2K'"
