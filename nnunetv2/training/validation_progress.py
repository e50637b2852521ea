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


class ValidationProgress:
    """A folder with an empty file per case that is done.

    It lives as long as the validation is incomplete.

    It also holds a fingerprint of network, settings and data. Cases count as done only for that fingerprint:
    after further training, with other settings or with data that were preprocessed otherwise, everything is predicted
    anew. A validation that was completed leaves nothing behind, so repeating it predicts everything too.

    Args:
        folder: Of the predictions.
        endings: Of the files of a case. Without one of them it is not done: people empty the folder to have all
            predicted anew, and a hidden folder stays.
    """

    def __init__(self, folder: Path, endings: Sequence[str]) -> None:
        self._predictions, self._endings = folder, tuple(endings)
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
        files = [self._predictions / f"{case}{ending}" for ending in self._endings]
        return all(file.is_file() for file in (self._folder / f"{case}.done", *files))

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
