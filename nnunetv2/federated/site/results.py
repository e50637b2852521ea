"""Check the results that a coordinator sends.

Checks that depend on the kind of exchange are in its step: kind and size of a result, the round of an aggregate. Names,
shapes, dtypes and values of weights are checked by `participant.Participant`, which knows the network.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.exchanges.steps import parse_key, step_of
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import ExchangeKey, Key, Q, R, RunKey
from nnunetv2.federated.protocol.secure_fingerprint_messages import Geometry
from nnunetv2.federated.protocol.strict_json import validated
from nnunetv2.utilities.size_limits import OversizedError, largest_model_bytes


def weights_bytes(registration: messages.Registration) -> int:
    """Return the largest size in bytes of a registered network's weights."""
    return sum(4 * math.prod(entry.shape) for entry in registration.tensors)


class ResultSizes:
    """Limits of the bytes of a site's results, by the networks that it has registered."""

    def __init__(self) -> None:
        self._weights: dict[str, int] = {}
        """Run -> bytes of the weights that this site has registered for it."""

    def note(self, key: Key, message: messages.Message) -> None:
        """Remember the network that a site registers for a run; other messages say nothing here."""
        if isinstance(message, messages.Registration) and isinstance(key, RunKey):
            self._weights[key.run] = weights_bytes(message)

    def lacks(self, key: Key) -> bool:
        """Tell whether the network registered under this key is still unknown."""
        return (
            isinstance(key, RunKey)
            and step_of(key).contribution is messages.Registration
            and key.run not in self._weights
        )

    def largest(self, key: Key) -> int:
        """Return how many bytes the result of an exchange may have."""
        return step_of(key).largest_result(self._weights.get(key.run, 0) if isinstance(key, RunKey) else 0)


def largest_model(folder: Path, *, copies: int = 1, held: int = 0) -> int:
    """Return how many bytes of a model nnUNet_max_model_gb and the disk allow.

    Args:
        copies: How often it is written on that disk.
        held: Bytes of it that are there already.

    Raises:
        FederationError: The environment variable holds no size.
    """
    try:
        largest = largest_model_bytes()
    except ValueError as error:
        raise FederationError(str(error)) from error
    return min(largest, (shutil.disk_usage(folder).free + held) // copies)


def too_large(what: str, error: OversizedError) -> WireError:
    """Return the error for an answer of more bytes than it can have."""
    return WireError(f"what the coordinator sends for {what} is refused: {error}")


class ChannelStatistics(messages.Part):
    """Intensities of one channel, as planning and normalisation read them."""

    mean: messages.Finite
    std: Annotated[messages.Finite, Field(ge=0)]
    min: messages.Finite
    max: messages.Finite
    median: messages.Finite
    percentile_00_5: messages.Finite
    percentile_99_5: messages.Finite


class Fingerprint(messages.Part):
    """The content of dataset_fingerprint.json, as planning reads it."""

    spacings: Annotated[tuple[messages.Spacing, ...], Field(min_length=1)]
    shapes_after_crop: Annotated[tuple[messages.Shape, ...], Field(min_length=1)]
    median_relative_size_after_cropping: messages.Positive
    foreground_intensity_properties_per_channel: dict[str, ChannelStatistics]


class SpacingStatistics(messages.Part):
    """Order statistics of the spacings of all cases, per axis."""

    percentile_10: messages.Spacing
    percentile_50: messages.Spacing
    median: messages.Spacing


class ShapeStatistics(messages.Part):
    """Order statistics of the shapes of all cases, per axis."""

    median: messages.Spacing


class GeometryStatistics(messages.Part):
    """The statistics in the place of the lists of cases."""

    num_cases: Annotated[int, Field(ge=1)]
    spacings: SpacingStatistics
    shapes_after_crop: ShapeStatistics


class FingerprintWithoutLists(messages.Part):
    """The content of dataset_fingerprint.json in such a federation."""

    geometry_statistics: GeometryStatistics
    median_relative_size_after_cropping: messages.Positive
    foreground_intensity_properties_per_channel: dict[str, ChannelStatistics]


def check_fingerprint(
    pooled: messages.PooledFingerprint, num_channels: int, *, geometry: Geometry = "list"
) -> Fingerprint | FingerprintWithoutLists:
    """Return a pooled fingerprint if it is finite and its counts agree.

    Args:
        num_channels: Channels of this site's images.
        geometry: How the federation tells of spacings and shapes.

    Raises:
        WireError: It is not, or they do not.
    """
    model = Fingerprint if geometry == "list" else FingerprintWithoutLists
    found = validated(lambda: model.model_validate(pooled.fingerprint), "the pooled fingerprint")
    if isinstance(found, FingerprintWithoutLists):
        if found.geometry_statistics.num_cases != pooled.num_cases:
            raise WireError(
                f"the pooled fingerprint describes {found.geometry_statistics.num_cases} of {pooled.num_cases} cases"
            )
    elif len({len(found.spacings), len(found.shapes_after_crop), pooled.num_cases}) > 1:
        raise WireError(
            f"the pooled fingerprint has {len(found.spacings)} spacings and {len(found.shapes_after_crop)} "
            f"shapes of {pooled.num_cases} cases"
        )
    channels = found.foreground_intensity_properties_per_channel.keys()
    if channels != set(map(str, range(num_channels))):
        raise WireError(
            f"the pooled fingerprint describes channels {', '.join(sorted(channels)) or 'none'}; this "
            f"site has {num_channels}, counted from 0. Use matching versions at all sites and at the "
            "coordinator"
        )
    return found


def check_bins(wanted: messages.WantedBins, num_channels: int) -> None:
    """Raise WireError unless the wanted bins ascend in each channel of this site."""
    if len(wanted.bins) != num_channels or any(list(bins) != sorted(set(bins)) for bins in wanted.bins):
        raise WireError(
            f"the coordinator asks for bins of {len(wanted.bins)} channels, or for some twice; this site "
            f"has {num_channels} channels"
        )


def check_receipt(sent_to: ExchangeKey[Q, R], counts_in: str) -> ExchangeKey[Q, R]:
    """Return the exchange in which a contribution counts; check that it can."""
    if counts_in in ("", sent_to):
        return sent_to
    other = parse_key(counts_in)
    is_of_the_run = isinstance(sent_to, RunKey) and isinstance(other, type(sent_to)) and other.run == sent_to.run
    if not is_of_the_run or not step_of(sent_to).policy.recurs:
        raise WireError(f"the coordinator counts what was sent to {sent_to} in {counts_in}")
    return other
