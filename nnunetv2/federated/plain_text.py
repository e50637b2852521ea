"""Make text from strangers harmless to a terminal and to a log with one line per event."""
from __future__ import annotations


def printable(text: str) -> str:
    """Return text on one line, in which characters that cannot be seen stand as escapes.

    Among them are those that move the cursor, colour a terminal or turn the direction of writing: with them, one site
    could make up lines in the name of another.
    """
    return "".join(one if one.isprintable() else _visible(one) for one in text)


def _visible(character: str) -> str:
    return " " if character in "\n\r\t" else character.encode("unicode_escape").decode("ascii")
