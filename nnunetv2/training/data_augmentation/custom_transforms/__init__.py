"""Batched NumPy transforms of earlier releases, for code that imports them.

They work on `data` and `seg` `(b, c, *spatial)`.
"""
