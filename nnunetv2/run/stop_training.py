"""End a running training after its present epoch: the command nnUNetv2_stop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.plain_text import show


def stop_entry() -> None:
    """Run `nnUNetv2_stop`."""
    run_command(main)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, and ask the training to stop."""
    folder = build_parser().parse_args(argv).folder
    holder = stop_training(folder)
    show(
        f"The training in {folder}{f' ({holder})' if holder else ''} ends after its present epoch, writes "
        "checkpoint_final.pth and validates. nnUNetv2_train ... --c goes on with the next epoch."
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_stop`."""
    parser = argparse.ArgumentParser(
        description="Let a running training end after its present epoch, with checkpoint_final.pth and validation."
    )
    parser.add_argument(
        "folder", type=Path, help="Folder of the fold: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X"
    )
    return parser


def stop_training(folder: Path) -> str:
    """Ask the training in the folder of a fold to stop; return which it is.

    Raises:
        FileNotFoundError: There is no such folder.
        RuntimeError: Nobody trains there, or the training does not stop that way.
    """
    from nnunetv2.training.folder_lock import find_training
    from nnunetv2.training.stopping import request_stop

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    training = find_training(folder)
    if training is None:
        folds = sorted(entry.name for entry in folder.glob("fold_*"))
        hint = f": name the folder of a fold, {', '.join(folds)}" if folds else ""
        raise RuntimeError(f"no training is running in {folder}{hint}")
    if training.refuses_to_stop:
        raise RuntimeError(f"the training in {folder} is not stopped: {training.refuses_to_stop}")
    request_stop(folder, training.holder)
    return training.holder


if __name__ == "__main__":
    stop_entry()
