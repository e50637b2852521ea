"""What planning raises for bad input."""


class InvalidInputError(ValueError, AssertionError):
    """An argument or a dataset is not as expected.

    Also an AssertionError, because the reference release checks with assertions and callers catch those.
    """


class InvalidDatasetError(InvalidInputError, RuntimeError):
    """A dataset failed the integrity check. The findings have been printed."""
