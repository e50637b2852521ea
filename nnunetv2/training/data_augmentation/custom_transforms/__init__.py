"""Batched NumPy transforms of earlier releases, on `data` and `seg` `(b, c, *spatial)`, for code that imports them."""
