"""Text of others, for the federation's modules: see `nnunetv2.utilities.plain_text`."""
from nnunetv2.utilities.plain_text import printable

__all__ = ["printable"]
