"""Check kind, size and round of the results that a coordinator sends.

Names, shapes, dtypes and values of weights are checked by `participant.Participant`, which knows the network.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from nnunetv2.federated.errors import WireError
from nnunetv2.federated.exchanges.exchange import WEIGHT_KINDS, Kind, parse_key
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.strict_json import validated

MESSAGE_ALLOWANCE = 4 << 20
"""Bytes beside its tensors that a set of weights may have: names and shapes."""
LARGEST_MESSAGE = 64 << 20
"""Bytes of a result that grows with cases or tensors of all sites: a pooled fingerprint, a match."""
MAX_ROUNDS = 100_000
"""No run has more. A site keeps curves with a value per round."""

RESULTS_OF_KIND: dict[Kind, tuple[type[messages.Message], ...]] = {
    "census": (messages.PooledCensus,),
    "coarse": (messages.WantedBins,),
    "fine": (messages.PooledFingerprint, messages.WantedBins),
    "plans": (messages.PlansAgreement,),
    "late_census": (messages.PooledCensus,),
    "late_plans": (messages.PlansAgreement,),
    "registration": (messages.Match,),
    "admission": (messages.Match,),
    "initial": (messages.Aggregate,),
    "round": (messages.Aggregate,),
    "validation": (messages.PooledValidation,),
}


def weights_bytes(registration: messages.Registration) -> int:
    """Return the largest size in bytes of a registered network's weights."""
    return sum(4 * math.prod(entry.shape) for entry in registration.tensors)


def largest_result(key: str, weights: int) -> int:
    """Return how many bytes the result of an exchange may have.

    Args:
        weights: Bytes of this site's own weights in its run; 0 if it has registered none.

    Raises:
        RefusedError: There is no such exchange.
    """
    kind = parse_key(key).kind
    if kind in WEIGHT_KINDS:
        return weights + MESSAGE_ALLOWANCE
    return LARGEST_MESSAGE if kind in ("fine", "registration", "admission") else MESSAGE_ALLOWANCE


def check_result(key: str, message: messages.Message) -> None:
    """Raise WireError unless a message fits the exchange that it answers."""
    kind = parse_key(key).kind
    expected = RESULTS_OF_KIND[kind]
    if not isinstance(message, expected):
        raise WireError(
            f"the coordinator answers {key} with a message of kind {message.kind}, expected "
            f"{' or '.join(one.model_fields['kind'].default for one in expected)}"
        )
    if isinstance(message, messages.Aggregate):
        if (message.round is None) != (kind == "initial"):
            raise WireError(
                f"the coordinator answers {key} with an aggregate of "
                f"{'no round' if message.round is None else f'round {message.round}'}"
            )
        check_round(message.round or 0)


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


def check_fingerprint(pooled: messages.PooledFingerprint, num_channels: int) -> None:
    """Raise WireError unless a pooled fingerprint is finite and its counts agree.

    Args:
        num_channels: Channels of this site's images.
    """
    found = validated(lambda: Fingerprint.model_validate(pooled.fingerprint), "the pooled fingerprint")
    counts = {len(found.spacings), len(found.shapes_after_crop), pooled.num_cases}
    if len(counts) > 1:
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


def check_bins(wanted: messages.WantedBins, num_channels: int) -> None:
    """Raise WireError unless the wanted bins ascend in each channel of this site."""
    if len(wanted.bins) != num_channels or any(list(bins) != sorted(set(bins)) for bins in wanted.bins):
        raise WireError(
            f"the coordinator asks for bins of {len(wanted.bins)} channels, or for some twice; this site "
            f"has {num_channels} channels"
        )


def check_round(number: int) -> None:
    """Raise WireError if no run can have come to a round of this number."""
    if number > MAX_ROUNDS:
        raise WireError(f"the coordinator speaks of round {number}; no run has more than {MAX_ROUNDS}")


def check_receipt(sent_to: str, counts_in: str) -> str:
    """Return the exchange in which a contribution counts; check that it can."""
    if counts_in in ("", sent_to):
        return sent_to
    sent, other = parse_key(sent_to), parse_key(counts_in)
    if (sent.kind, sent.run) != (other.kind, other.run) or sent.kind != "round":
        raise WireError(f"the coordinator counts what was sent to {sent_to} in {counts_in}")
    return counts_in
