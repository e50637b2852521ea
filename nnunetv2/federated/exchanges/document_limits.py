"""Bound the sizes of documents before any of their JSON is read.

The limits of a header follow from facts that are known already: cases, channels, tensors. So nobody can make another
one parse megabytes of nonsense, and a document that is too large is refused before it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nnunetv2.federated.protocol.document import Limits, TensorSpec
from nnunetv2.federated.protocol.messages import MAX_CASES, MAX_LABELS, MAX_TENSORS

SMALL = Limits(header_bytes=1 << 20, elements=5 * MAX_LABELS)
"""Headers of most documents, where nothing is known beforehand. Those of real sites have some tens of KiB."""
PLANS = Limits(header_bytes=2 << 20, elements=5 * MAX_LABELS)
REGISTRATION = Limits(header_bytes=4 << 20, elements=5 * MAX_TENSORS)
"""Plans, labels, and the names and shapes of all tensors."""
METRICS_BYTES = 128 << 10
"""The figures that come with an update, those of its own round and of an earlier one."""
_METRICS_ELEMENTS = 10_000
_TENSOR_BYTES = 400
"""The entry of one tensor in a header, without its name,"""
_TENSOR_ELEMENTS = 16
"""and the brackets and commas of that entry."""
_CASE_BYTES, _CASE_ELEMENTS = 200, 10
"""Spacing, shape and relative size of one case: seven numbers."""
_CHANNEL_BYTES, _CHANNEL_ELEMENTS = 1000, 40
"""Moments of a channel, and its tensor; as many quotation marks."""
_LARGEST_HEADER = 64 << 20
AGGREGATE = Limits(header_bytes=4 << 20, elements=_TENSOR_ELEMENTS * MAX_TENSORS)
"""Of results, whose tensors are not counted: the names and shapes of an aggregate,"""
MATCH = Limits(header_bytes=_LARGEST_HEADER, elements=1_000_000)
"""and each tensor's name at each site."""


def weights_limits(specs: Mapping[str, TensorSpec]) -> Limits:
    """Return the limits of a set of weights, of which these tensors are expected."""
    header = METRICS_BYTES + sum(_TENSOR_BYTES + len(name) for name in specs)
    return Limits(
        file_bytes=8 + header + sum(spec.nbytes for spec in specs.values()),
        header_bytes=header,
        elements=_METRICS_ELEMENTS + _TENSOR_ELEMENTS * len(specs),
    )


def coarse_limits(num_cases: int, num_channels: int, *, tensor_bytes: int) -> Limits:
    """Return the limits of a coarse summary from its site's census."""
    header = (64 << 10) + _CASE_BYTES * num_cases + _CHANNEL_BYTES * num_channels
    of_channels = _CHANNEL_ELEMENTS * num_channels
    return Limits(
        file_bytes=8 + header + tensor_bytes,
        header_bytes=header,
        quotes=100 + of_channels,
        elements=1000 + _CASE_ELEMENTS * num_cases + of_channels,
    )


def with_tensors(header: Limits, *, tensor_bytes: int = 0) -> Limits:
    """Return the limits of a document with such a header and so many bytes."""
    return replace(header, file_bytes=8 + header.header_bytes + tensor_bytes)


def fingerprint_limits(num_cases: int | None) -> Limits:
    """Return the limits of a pooled fingerprint, which lists the cases of all sites.

    Args:
        num_cases: Their number, where that is known.
    """
    cases = MAX_CASES if num_cases is None else num_cases
    return Limits(
        header_bytes=min(_LARGEST_HEADER, (1 << 20) + _CASE_BYTES * cases),
        elements=min(4_000_000, 5 * MAX_LABELS + _CASE_ELEMENTS * cases),
    )
