"""What a person at the terminal sees when a command fails."""

import argparse
import os
import subprocess
import sys

import pytest

from nnunetv2.utilities.command_line import add_device_option, find_command, run_command


class OwnError(Exception):
    __module__ = "nnunetv2.somewhere"


@pytest.fixture(autouse=True)
def _program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nnUNetv2_train"])


def fail_with(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\n  input"),
        FileNotFoundError("bad input"),
        RuntimeError("bad input"),
        AssertionError("bad input"),
        OwnError("bad input"),
    ],
)
def test_expected_errors_become_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(fail_with(error))
    assert caught.value.code == 1
    assert capsys.readouterr().err == "nnUNetv2_train: error: bad input\n"


def test_error_without_message_is_located(capsys):
    with pytest.raises(SystemExit):
        run_command(fail_with(AssertionError()))
    assert "AssertionError in" in capsys.readouterr().err


def test_programming_errors_keep_their_traceback():
    with pytest.raises(KeyError):
        run_command(fail_with(KeyError("x")))


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_debug", "1")
    with pytest.raises(SystemExit):
        run_command(fail_with(ValueError("bad input")))
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(fail_with(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_success_returns_and_failure_status_is_passed_on():
    assert run_command(lambda: None) is None
    assert run_command(lambda: 0) is None
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: 3)
    assert caught.value.code == 3


PRINTING = """
import sys
from nnunetv2.utilities.command_line import run_command

def print_lines():
    print("\\n".join(map(str, range({number}))))
    if {fails}:
        raise ValueError("something else")

run_command(print_lines)
"""


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise")
@pytest.mark.parametrize(
    ("number", "fails", "unbuffered", "status", "error"),
    [
        (3, False, "", 0, ""),
        (500_000, False, "", 141, ""),
        (3, False, "1", 141, ""),
        (3, True, "", 1, "-c: error: something else\n"),
    ],
)
def test_a_reader_that_goes_away_is_no_error(number, fails, unbuffered, status, error):
    """As `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PRINTING.format(number=number, fails=fails)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, error)


def test_other_pipes_that_break_are_errors(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(fail_with(BrokenPipeError(32, "Broken pipe")))
    assert caught.value.code == 1 and "Broken pipe" in capsys.readouterr().err


def test_device_option():
    parser = argparse.ArgumentParser()
    add_device_option(parser)
    assert parser.parse_args([]).device == "cuda"
    assert parser.parse_args(["-device", "cpu"]).device == "cpu"
    with pytest.raises(SystemExit):
        parser.parse_args(["-device", "gpu:1"])


HOSTILE = "case\x1b]0;owned\x07\x1b[2K\x9b8m\u202e\u2028forged\n\ud800"
SHOWING = f"""
import logging, warnings
from nnunetv2.utilities.command_line import run_command
text = {HOSTILE!r}

def show_all():
    logging.getLogger("nnunetv2.x").info("case %s", text)
    logging.getLogger("other").warning(text)
    warnings.warn(text)
    raise KIND(text)

run_command(show_all)
"""


@pytest.mark.parametrize("kind", ["ValueError", "OSError", "RuntimeError", "KeyError", "TypeError"])
def test_no_text_of_others_commands_the_terminal(kind):
    """Neither as an error, a message, or a warning, nor in the traceback of a mistake of our own."""
    done = subprocess.run(
        [sys.executable, "-c", SHOWING.replace("KIND", kind)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogatepass"},
    )
    shown = done.stderr.decode("utf-8", "surrogatepass")
    assert done.returncode == 1
    assert shown.replace("\n", "").isprintable() and shown.count("owned") >= 4
    assert not any(line.startswith("forged") for line in shown.splitlines() if kind in ("ValueError", "OSError"))
    assert ("Traceback" in shown) == (kind in ("KeyError", "TypeError"))


def test_commands_are_found_in_the_folder_that_is_given_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "nnUNetv2_here").touch(mode=0o755)
    with pytest.raises(FileNotFoundError, match=f"no command nnUNetv2_here in {tmp_path / 'given'}: install"):
        find_command("nnUNetv2_here", tmp_path / "given")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "nnUNetv2_here").touch(mode=0o755)
    assert find_command("nnUNetv2_here", tmp_path / "given") == str(tmp_path / "given" / "nnUNetv2_here")
    assert find_command("nnUNetv2_here") == str(tmp_path / "path" / "nnUNetv2_here")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "given" / "python"))
    assert find_command("nnUNetv2_here") == str(tmp_path / "given" / "nnUNetv2_here"), "the nearest one"
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'given'} or on the PATH"):
        find_command("nnUNetv2_nowhere")
