"""Count epochs in rounds: after so many epochs, the sites exchange their weights."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_EPOCHS = 1000
"""Of a federation, where nothing else is said."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of a training, counted from 0 like its epochs.

    epochs = 3      epoch   0 1 2   3 4 5   6
                    round   0       1       2       the last one may be shorter
    """

    epochs: int = 1
    """Epochs of a round, at least 1."""

    def of(self, epoch: int) -> int:
        """Return the round that an epoch belongs to."""
        return epoch // self.epochs

    def first_epoch(self, number: int) -> int:
        """Return the epoch that a round begins with."""
        return number * self.epochs

    def is_last_of_round(self, epoch: int, num_epochs: int) -> bool:
        """Tell whether a round ends with this epoch."""
        return (epoch + 1) % self.epochs == 0 or epoch + 1 == num_epochs

    def count(self, num_epochs: int) -> int:
        """Return the number of rounds of a training."""
        return -(-num_epochs // self.epochs)
