"""What this package raises when it is given something that it cannot work with."""


class InvalidInputError(ValueError, AssertionError):
    """Shapes, settings or folders that do not fit. Also an AssertionError, which scripts for nnU-Net 2 may expect."""


class FolderInUseError(RuntimeError):
    """Another process writes to the same folder."""
