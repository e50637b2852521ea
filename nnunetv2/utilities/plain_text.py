"""Write text of others so that every character shows and commands nothing.

To a terminal or a log.

Names, labels, reasons and errors come from other sites, from a coordinator, from files. Among their characters may be
some that move the cursor, colour a terminal, turn the direction of writing, or are not seen at all. So a command prints
through `show`, logs through `PlainTextFormatter`, and quotes commands to type with `shell_command`.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, TextIO

# Letters and marks that leave no trace, which Python counts among the printable ones: the grapheme joiner, fillers of
# Hangul, inherent vowels of Khmer, Mongolian and other variation selectors, the empty Braille pattern. The two
# selectors that follow an emoji (U+FE0E, U+FE0F) stay.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
_BLANKS = str.maketrans("\n\r\t", "   ")


def printable(text: object, *, lines: bool = False, most: int | None = None) -> str:
    """Return text in which characters that cannot be seen stand as escapes, such as `\\x1b`.

    These are the Unicode categories Cc, Cf, Cs, Co, Cn, Zl, Zp, blanks other than the plain one, and letters that leave
    no trace. Line breaks and tabulators become blanks: nobody can make up lines in the name of another. Escapes stay
    as they are.

    Args:
        text: Anything that has a text.
        lines: Whether line breaks stay, for text of our own.
        most: Characters, at least 3, after which the result is cut, with "..." at its end.
    """
    text = str(text)
    if most is not None:
        text = text[: most + 1]  # an escape is never shorter than its character
    if lines:
        text = "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))
    elif not text.isprintable() or _INVISIBLE.search(text):
        text = "".join(map(_visible, text.translate(_BLANKS)))
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def _visible(character: str) -> str:
    if character.isprintable() and not _INVISIBLE.match(character):
        return character
    return character.encode("unicode_escape").decode("ascii")


def excerpt(text: str, characters: int) -> str:
    """Return the printable beginning of a text.

    Written as JSON, it has at most so many characters.

    One character of a stranger's text becomes up to twelve, as an escape here or in JSON: so the cut comes last.
    """
    shown, room = [], characters
    for one in text.translate(_BLANKS):
        visible = _visible(one)
        room -= len(json.dumps(visible)) - 2
        if room < 0:
            break
        shown.append(visible)
    return "".join(shown)


def printable_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, with unseen characters as JSON's own escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(one if one == "\n" or _visible(one) == one else _json_escape(one) for one in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[begin : begin + 4]}" for begin in range(0, len(units), 4))


def show(*lines: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print each text on one line of its own, `printable`.

    Characters that the terminal's encoding lacks are escaped too.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "\n".join(map(printable, lines))
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=flush)


def shell_command(program: str, *words: object, options: Iterable[tuple[str, object | None]] = ()) -> str:
    """Return a command to type, quoted.

    No word of it is taken for a command or an option.

    Args:
        program: The name of the program.
        words: Its arguments. A path that begins with "-" is written as `./-...`; other words that do come after `--`.
        options: Pairs of an option and its value, None for a flag; a pair with the same option as the one before adds
            a value to it.
    """
    named, last = [], None
    for option, value in options:
        word = "" if value is None else printable(value)
        if value is None:
            named.append(option)
        elif word.startswith("-"):
            named.append(f"{option}={word}")
        else:
            named += [word] if option == last else [option, word]
        last = option
    plain = [
        printable(f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else word) for word in words
    ]
    if any(word.startswith("-") for word in plain):
        return shlex.join([program, *named, "--", *plain])
    return shlex.join([program, *plain, *named])


class PlainTextFormatter(logging.Formatter):
    """Write records of a log as printable text.

    Line breaks are kept where the message itself has them.

    Texts, paths and errors that fill its placeholders stay on one line each.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        plain = logging.makeLogRecord(record.__dict__)
        if isinstance(plain.args, tuple):
            plain.args = tuple(
                printable(one) if isinstance(one, str | PurePath | BaseException) else one for one in plain.args
            )
        return printable(super().format(plain), lines=True)


def log_plainly() -> None:
    """Write warnings, also Python's own, to stderr as printable text.

    Unless logging is set up in this process.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PlainTextFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
