"""The errors of the federation: one root, and a child per kind of trouble."""

from __future__ import annotations


class FederationError(Exception):
    """Something about the federation went wrong.

    Its text is meant for the person at the keyboard.
    """


class WireError(FederationError, ValueError):
    """Bytes from the network, or a file of them, violate the protocol."""


class StatisticsError(FederationError, ValueError):
    """Summaries of intensities cannot be built or cannot be pooled."""


class MatchingError(FederationError, ValueError):
    """The networks of the sites share nothing, or suspiciously little."""


class AggregationError(FederationError, ValueError):
    """Updates cannot be averaged."""


class PrecisionError(FederationError, ValueError):
    """A weight is too large for the precision of the federation."""


class NotJoinedError(FederationError):
    """This machine has no credential that the coordinator knows."""


class CoordinatorUnreachable(FederationError, ConnectionError):  # noqa: N818 - a state of affairs, and a public name
    """The coordinator did not answer for as long as the site was willing to wait."""


class StillOpenError(FederationError):
    """An exchange was not closed for as long as the site was willing to wait."""


class NotAllowedError(FederationError):
    """This site's own rules forbid sending a document."""


class BrokenTrainingError(FederationError):
    """The training of this site went wrong: there is nothing to send.

    Others learn only the name of the child.
    """


class NonFiniteError(BrokenTrainingError):
    """Weights or losses are NaN or infinite."""


class ShortEpochError(BrokenTrainingError):
    """An epoch had fewer iterations than it should have."""


class RefusedError(FederationError):
    """The coordinator, or the rules of the federation, refuse a request.

    Args:
        message: The refused request, and the reason.
        remedy: Advice for the person who reads it.
        code: Short name of the reason, the same for every refusal of its kind.
    """

    def __init__(self, message: str, remedy: str = "", *, code: str = "refused") -> None:
        super().__init__(in_sentences(message, remedy))
        self.message = message
        self.remedy = remedy
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Keep all three parts when the error crosses a process boundary."""
        return _rebuild_refusal, (type(self), self.message, self.remedy, self.code)


def in_sentences(message: str, remedy: str) -> str:
    """Return a refusal, with its remedy if there is one, as people read it."""
    return f"{message}. {remedy}" if remedy else message


def _rebuild_refusal(kind: type[RefusedError], message: str, remedy: str, code: str) -> RefusedError:
    return kind(message, remedy, code=code)


def reason_without_paths(error: BaseException) -> str:
    """Return the text of an error for other machines.

    Paths of this one are no business of theirs.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return error.strerror or type(error).__name__
    return str(error)
