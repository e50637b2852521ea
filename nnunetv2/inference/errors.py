"""Name the faults of a network's answers, and the cases that came to nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


class NonFiniteLogitsError(RuntimeError):
    """The network answered with NaN, infinity, or more than float16 holds."""

    def __init__(self) -> None:
        super().__init__(
            "the network's logits are not finite, or beyond the range of float16 (65504). Check the image for NaN and "
            "extreme values, and the checkpoint for a training that diverged"
        )


class NoPreviousStageError(FileNotFoundError):
    """No case of a cascade has a label map of the previous stage."""


class UnpreparedCaseError(RuntimeError):
    """A case could not be prepared.

    The iterator that raised this goes on with the next one.

    Args:
        case: Its name, or the path that it is written to; messages give the last part.
        reason: The cause, in words.
    """

    def __init__(self, case: str, reason: str) -> None:
        super().__init__(case, reason)  # both are `args`, so that the error survives the way out of a process
        self.case = case
        self.reason = reason

    def __str__(self) -> str:
        return f"case {Path(self.case).name}: {self.reason}"


class FailedCasesError(RuntimeError):
    """Some cases could not be predicted; the results of all others are there.

    Programs look for how the message about memory begins.

    Args:
        failures: Name of a case, or the path that it is written to, and its error.
        total: Number of cases, with those that did not fail.
    """

    def __init__(self, failures: Sequence[tuple[str, BaseException]], total: int) -> None:
        super().__init__(failures, total)  # both are `args`, so that the error survives the way out of a process
        self.failures = failures
        self.total = total

    def __str__(self) -> str:
        last_parts = [Path(name).name for name, _ in self.failures]
        count = Counter(last_parts)
        lines = [
            f"{last if count[last] == 1 else name}: {describe_failure(error)}"
            for last, (name, error) in zip(last_parts, self.failures)
        ]
        missing = f"{len(lines)} of {self.total} cases could not be predicted: {'; '.join(lines)}"
        if not any(isinstance(error, MemoryError) for _, error in self.failures):
            return missing
        return (
            f"Segmentation export worker died. The memory did not suffice: use fewer export workers (-nps). {missing}"
        )


def describe_failure(error: BaseException) -> str:
    """Return the error of a case, without its name."""
    return error.reason if isinstance(error, UnpreparedCaseError) else f"{type(error).__name__}: {error}"
