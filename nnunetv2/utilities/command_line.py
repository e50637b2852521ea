"""Options, logging and error lines that all commands share, and where the commands are."""

from __future__ import annotations

import argparse
import logging
import os
import select
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from nnunetv2.utilities.plain_text import log_plainly, printable, show

DEVICES = ("cuda", "cpu", "mps")
SIGPIPE = 13  # `signal` has it on some systems only
_EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, AssertionError, ImportError)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `-device` to a parser. Its value stays text; `utilities.device.resolve_device` makes it a device."""
    parser.add_argument(
        "-device",
        default="cuda",
        choices=DEVICES,
        help="Where the network runs: cuda (default), cpu or mps. To pick one of several GPUs, set "
        "CUDA_VISIBLE_DEVICES, for example CUDA_VISIBLE_DEVICES=1.",
    )


def dataset_argument(text: str) -> int | str:
    """Return the number or the name of a dataset, for the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: The text is neither.
    """
    if text.isdecimal():
        return int(text)
    if text.startswith("Dataset"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a dataset nor a name that starts with Dataset")


def find_command(name: str, folder: Path | None = None) -> str:
    """Return the path of a console script of this package.

    Args:
        folder: Where to look, and nowhere else. None: beside this Python, else on the PATH.

    Raises:
        FileNotFoundError: There is none.
    """
    beside_python = Path(sys.executable).parent
    found = shutil.which(name, path=str(folder or beside_python))
    if found is None and folder is None:
        found = shutil.which(name)
    if found is None:
        place = beside_python if folder is None else folder
        also = " or on the PATH" if folder is None else ""
        raise FileNotFoundError(f"there is no command {name} in {place}{also}: install this package there")
    return found


def run_command(function: Callable[[], int | None]) -> None:
    """Run a command line program; turn its failure into one line and a status.

    Returns normally on success, because some programs fill `sys.argv`, call our entry points and go on afterwards.
    Set the environment variable nnUNet_debug to see the traceback of an error.

    Raises:
        SystemExit: The function returned a status above 0, failed with one of the errors that bad input causes
            (status 1), was interrupted (status 130), or printed for a reader that has gone, as `head` does (141).
    """
    _set_up_logging()
    try:
        status = function()
    except KeyboardInterrupt:
        show(f"{_program()}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _drop_what_nobody_reads():
            raise SystemExit(128 + SIGPIPE) from None  # as a shell reports a process that this signal has ended
        if not _is_expected(error):
            raise
        if _wants_traceback():
            show(*traceback.format_exc().rstrip("\n").split("\n"), file=sys.stderr)
        show(f"{_program()}: error: {describe_error(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        _drop_what_nobody_reads()
    if status:
        raise SystemExit(status)


def describe_error(error: BaseException) -> str:
    """Return the message of an error as one printable line.

    One without a message is given by its type and place.
    """
    message = printable(" ".join(str(error).split()))
    if message:
        return message
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _drop_what_nobody_reads() -> bool:
    """Tell whether stdout's reader has gone; if so, drop the rest.

    Python would complain of it at its end.
    """
    try:
        sys.stdout.flush()
        is_unread = _is_broken(sys.stdout)
    except BrokenPipeError:
        is_unread = True
    except OSError:  # no file, or a full disk, of which Python tells at its end
        is_unread = False
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def _is_broken(file: TextIO) -> bool:
    """Tell whether nobody holds the other end of a pipe. Systems without `poll` have to try."""
    if not hasattr(select, "poll"):
        return False
    watch = select.poll()
    watch.register(file, 0)  # errors are reported unasked
    return bool(watch.poll(0))


def _is_expected(error: Exception) -> bool:
    """Tell errors with a message for the user from programming errors, whose traceback is the message."""
    return isinstance(error, _EXPECTED_ERRORS) or type(error).__module__.split(".")[0] == "nnunetv2"


def _wants_traceback() -> bool:
    return bool(os.environ.get("nnUNet_debug"))


def _program() -> str:
    name = Path(sys.argv[0]).name
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if name == "__main__.py" and spec is not None:
        return f"python -m {spec.parent}"
    return name or "nnunetv2"


def _set_up_logging() -> None:
    """Show warnings of all libraries and the progress messages of ours on stderr, unless logging is set up already.

    Texts that quote others are printable: messages, Python's own warnings, and the tracebacks of our mistakes.
    """
    log_plainly()
    logging.getLogger("nnunetv2").setLevel(logging.DEBUG if _wants_traceback() else logging.INFO)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_traceback


def _show_traceback(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, place))
    show(*text.rstrip("\n").split("\n"), file=sys.stderr)
