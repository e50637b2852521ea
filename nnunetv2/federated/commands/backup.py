"""Back up a federation from the command line, and restore it.

nnUNetv2_fed_admin --folder F backup FILE         nnUNetv2_fed_admin restore FILE FOLDER
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nnunetv2.federated.coordinator.storage.backup import backup, restore
from nnunetv2.utilities.plain_text import shell_command, show


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `backup` and `restore` to the parser of `nnUNetv2_fed_admin`."""
    text = "copy the federation into one file, while its coordinator runs or not"
    parser = commands.add_parser("backup", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("file", type=Path, metavar="FILE", help="a tar file that does not exist yet")
    parser.set_defaults(function_of_folder=_backup_command)
    text = "make the folder of a federation of a backup"
    parser = commands.add_parser("restore", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("into", type=Path, metavar="FOLDER", help="a folder that does not exist yet")
    parser.set_defaults(function_of_folder=_restore_command)


def _backup_command(folder: Path, arguments: argparse.Namespace) -> None:
    saved = backup(folder, arguments.file)
    show(
        f"{saved.federation}: {len(saved.files)} files, {arguments.file.stat().st_size / 1e6:.1f} MB, saved to "
        f"{arguments.file}. Keep it as safe as {folder}: who has it can pose as this coordinator."
    )


def _restore_command(folder: Path, arguments: argparse.Namespace) -> None:
    restored = restore(arguments.file, arguments.into)
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(restored.created))
    show(
        f"{restored.federation} is as it was at {moment}, in {arguments.into}. Make sure that the old coordinator "
        f"does not run any more, then: "
        + shell_command("nnUNetv2_fed_coordinator", options=[("--folder", arguments.into)])
    )
