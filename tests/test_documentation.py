"""The pages name existing commands, options, environment variables and links."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "documentation").glob("*.md"))]
DEPLOY = [path for path in sorted((PROJECT / "deploy").iterdir()) if path.is_file()]
ADMIN_COMMANDS = "backup|invite|log|proceed|restore|revoke|settings|verify-log"
OF_OTHER_PROGRAMS = {"--ipc", "--no-deps", "--shm-size", "--signal"}
"""Options in the texts that are not ours: those of container engines, of pip and of schedulers."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- commands
@cache
def commands() -> dict[str, str]:
    """Return the installed commands: command -> module:function."""
    (table,) = (
        node.value
        for node in ast.parse(read(PROJECT / "setup.py")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "COMMANDS"
    )
    return ast.literal_eval(table)


class Found(BaseException):
    pass


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command, by starting it up to where it would read its arguments."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Found(parser)

    module, function = commands()[command].split(":")
    entry = getattr(importlib.import_module(f"nnunetv2.{module}"), function)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)  # which `parse_args` calls
        entry()
    return found.value.args[0]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of all options of a parser, and of the commands below it."""
    below = [
        one
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for one in action.choices.values()
    ]
    return {name for action in parser._actions for name in action.option_strings}.union(*map(options_of, below))


def commands_in(text: str) -> Iterator[str]:
    """Yield the command lines in a page: indented ones, and whole ones between backticks. Backslashes join lines."""
    joined = re.sub(r"\s*\\\n[\s#]*", " ", text)
    for line in joined.splitlines():
        if match := re.match(
            r"(?:\s{4,}|#   |ExecStart=)(?:docker exec \S+ |runuser -u \S+ -- )?(?:\w+=\S+ )*(?:\S*/)?"
            r"(nnUNetv2_\w+(?: .*)?)$",
            line,
        ):
            yield re.split(r"  +#|     ", match[1])[0]
    yield from re.findall(r"`(nnUNetv2_\w+ [^`]*)`", text)
    for words in re.findall(rf"`((?:{ADMIN_COMMANDS}) [^`]+)`", text):
        yield "nnUNetv2_fed_admin " + re.sub(r"\b[NS]\b", "2", words)


@cache
def all_commands() -> list[str]:
    found = [command for path in (*PAGES, *DEPLOY) for command in commands_in(read(path))]
    return sorted({" ".join(re.sub(r"[][]|\$\w+_OPTIONS", "", command).split()) for command in found})


@pytest.mark.parametrize("command", all_commands())
def test_every_command_on_the_pages_is_one(command):
    program, *arguments = shlex.split(command)
    if "..." in arguments:  # stands for further required arguments
        assert {word for word in arguments if word.startswith("-")} <= options_of(parser_of(program))
    else:
        parser_of(program).parse_args(arguments)


def test_commands_are_found():
    assert len(all_commands()) >= 90


def test_every_command_is_on_a_page_and_no_page_names_another():
    named = set(re.findall(r"nnUNetv2_\w+", "".join(map(read, (*PAGES, *DEPLOY)))))
    assert named == set(commands())


def test_every_option_on_the_pages_is_one():
    known = set().union(*(options_of(parser_of(command)) for command in commands())) | OF_OTHER_PROGRAMS
    for path in PAGES:
        named = set(re.findall(r"`(--?[A-Za-z][\w-]*)", read(path)))
        assert named <= known, path.name


def test_every_environment_variable_on_the_pages_is_read_somewhere():
    named = set(re.findall(r"\bnnUNet_\w+", "".join(map(read, PAGES)))) - {"nnUNet_federation", "nnUNet_raw_data"}
    source = "".join(read(path) for path in (PROJECT / "nnunetv2").rglob("*.py"))
    trainers = set(re.findall(r"^class (nnUNet_\w+)", source, flags=re.M))
    assert {name for name in named - trainers if f'"{name}"' not in source} == set()


# ---------------------------------------------------------------------------------------------------------- python
def python_blocks() -> list[tuple[str, str]]:
    return [
        (path.stem, block)
        for path in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", read(path), flags=re.M | re.S)
    ]


def test_what_python_on_the_pages_imports_is_there():
    blocks = python_blocks()
    assert len(blocks) >= 15
    for page, block in blocks:
        for node in ast.walk(ast.parse(block, filename=page)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("nnunetv2"):
                module = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(dir(module)), f"{page}: {node.module}"


# ----------------------------------------------------------------------------------------------------------- links
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as repositories on the web make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        if name.startswith("https://"):
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is():
    seen, ahead = set(), [PROJECT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        linked = {(page.parent / name).resolve() for name in re.findall(r"\]\(([^)#\s]+\.md)", read(page))}
        ahead += [path for path in linked - seen if path in PAGES]
    assert set(PAGES) == seen & set(PAGES)
