"""Errors for input that preprocessing cannot work with."""


class InvalidInputError(ValueError, AssertionError):
    """Shapes, settings or folders that do not fit.

    Also an AssertionError, which scripts for nnU-Net 2 may expect.
    """


class FolderInUseError(RuntimeError):
    """Another process writes to the same folder."""
