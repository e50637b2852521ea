"""Find docstrings, and what keeps their first lines from being read at a glance.

python tests/lint/docstrings.py    prints figures, and every first line that is out of form
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
MOST_WORDS = 15
_NO_SENTENCE = re.compile(r"(What|Say what|Say who|Tell what|Who|How)\b")


class Docstring(NamedTuple):
    file: str
    """Relative to the project."""
    name: str
    """Qualified by its classes; empty for the module's."""
    text: str

    @property
    def first_line(self) -> str:
        return " ".join(self.text.strip().partition("\n\n")[0].split())


def read_docstrings(folder: Path) -> Iterator[Docstring]:
    """Yield the docstrings of modules, and of public classes and functions, below a folder."""
    for path in sorted(folder.rglob("*.py")):
        file = path.relative_to(PROJECT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (Docstring(file, name, text) for name, text in _walk(tree, ()) if text)


def _walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Yield name and docstring of a node and of what is public inside it; functions keep theirs to themselves."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ".".join(names), ast.get_docstring(node)
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _walk(child, (*names, child.name))


def describe_fault(docstring: Docstring) -> str | None:
    """Return what is wrong with the first line of a docstring; None if nothing is."""
    first = docstring.first_line
    if _NO_SENTENCE.match(first):
        return "begins with a question word"
    if not first.endswith((".", ":")):
        return "does not end with a period"
    if len(first.split()) > MOST_WORDS:
        return f"has {len(first.split())} words"
    return None


def whats_per_thousand_words(docstrings: list[Docstring]) -> float:
    """Count "what" in docstrings, per 1,000 words."""
    words = [word for one in docstrings for word in re.findall(r"[A-Za-z']+", one.text.lower())]
    return 1000 * words.count("what") / len(words)


def main() -> None:
    docstrings = list(read_docstrings(PROJECT / "nnunetv2"))
    faults = [(one, fault) for one in docstrings if (fault := describe_fault(one))]
    for one, fault in faults:
        print(f"{one.file}: {one.name or 'module'}: {fault}: {one.first_line}")
    print(f"{len(faults)} of {len(docstrings)} first lines out of form", end="; ")
    print(f"'what' {whats_per_thousand_words(docstrings):.1f} times in 1,000 words")


if __name__ == "__main__":
    main()
