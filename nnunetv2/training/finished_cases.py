"""Remember which validation cases are done.

An interrupted validation goes on where it was.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = ".unfinished_validation"
FINGERPRINT = "fingerprint"


class FinishedCases:
    """A folder with an empty file per case that is done.

    It lives as long as the validation is incomplete.

    It also holds a fingerprint of what predicts. Cases count as done only for that fingerprint: after further training,
    or with other settings, everything is predicted anew. A validation that was completed leaves nothing behind, so
    repeating it predicts everything too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def open(self, fingerprint: str) -> None:
        """Begin, or go on if the validation that was interrupted had the same fingerprint."""
        path = self._folder / FINGERPRINT
        if not path.is_file() or path.read_text() != fingerprint:
            self.close()
            self._folder.mkdir(parents=True)
            path.write_text(fingerprint)

    def add(self, case: str) -> None:
        """Note that everything of a case is written."""
        (self._folder / f"{case}.done").touch()

    def __contains__(self, case: str) -> bool:
        return (self._folder / f"{case}.done").is_file()

    def close(self) -> None:
        """Forget all."""
        shutil.rmtree(self._folder, ignore_errors=True)


def fingerprint_of(network: torch.nn.Module, settings: Sequence[object]) -> str:
    """Return a digest of the weights of a network and of settings."""
    digest = hashlib.sha256(repr(list(settings)).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
