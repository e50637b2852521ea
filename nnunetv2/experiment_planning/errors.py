"""Errors of planning for bad input."""

from nnunetv2.errors import InvalidInputError


class InvalidDatasetError(InvalidInputError, RuntimeError):
    """A dataset failed the integrity check. Its cases' faults have been printed."""


class MissingFilesError(InvalidDatasetError, FileNotFoundError):
    """A dataset failed the integrity check, among other things because files are missing."""
