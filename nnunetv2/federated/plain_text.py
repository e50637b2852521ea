"""Make text from strangers harmless to a terminal and to a log with one line per event."""
from __future__ import annotations

import json


def printable(text: str) -> str:
    """Return text on one line, in which characters that cannot be seen stand as escapes.

    Among them are those that move the cursor, colour a terminal or turn the direction of writing: with them, one site
    could make up lines in the name of another.
    """
    return "".join(one if one.isprintable() else _visible(one) for one in text)


def excerpt(text: str, characters: int) -> str:
    """Return the printable beginning of a text; written as JSON, it has at most so many characters.

    One character of what a stranger sends becomes up to twelve, as an escape here or in JSON: so the cut comes last.
    """
    shown, room = [], characters
    for one in text:
        visible = one if one.isprintable() else _visible(one)
        room -= len(json.dumps(visible)) - 2
        if room < 0:
            break
        shown.append(visible)
    return "".join(shown)


def _visible(character: str) -> str:
    return " " if character in "\n\r\t" else character.encode("unicode_escape").decode("ascii")
