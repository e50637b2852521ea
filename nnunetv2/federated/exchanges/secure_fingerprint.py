"""Plan the sums of a secure fingerprint, as sites and coordinator both know them.

Every sum is about all sites of the census, or about nothing: who is missing is waited for, and none of fewer is opened.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2.federated.aggregation.fingerprint_sums import num_words
from nnunetv2.federated.exchanges.secure_sums import SecureSum, cohort_of
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import digest_of
from nnunetv2.federated.privacy.secure_aggregation.protocol import Lane
from nnunetv2.federated.protocol.keys import FingerprintSumKey, ShapeSumKey
from nnunetv2.federated.protocol.messages import PooledCensus
from nnunetv2.federated.protocol.secure_fingerprint_messages import NextSum
from nnunetv2.federated.protocol.strict_json import canonical_json

SUM = "sum"
"""The lane of the one vector that is added up."""


def plan_fingerprint_sum(
    key: FingerprintSumKey, asked: NextSum, *, federation: str, census: PooledCensus, num_channels: int
) -> SecureSum:
    """Plan one sum of a fingerprint.

    Args:
        asked: The request of the sum before.
    """
    return _plan(key, asked, federation=federation, census=census, num_channels=num_channels)


def plan_shape_sum(
    key: ShapeSumKey,
    asked: NextSum,
    *,
    federation: str,
    census: PooledCensus,
    target: Sequence[float] | np.ndarray | None,
) -> SecureSum:
    """Plan one sum of resampled shapes.

    Args:
        target: The spacing of the shapes, to which the masks are bound: those of sites with another one do not cancel.
            The coordinator, which makes no masks, does not know it.
    """
    reference = b"" if target is None else np.asarray(target, "<f8").tobytes()
    return _plan(key, asked, federation=federation, census=census, num_channels=0, reference=reference)


def _plan(
    key: FingerprintSumKey | ShapeSumKey,
    asked: NextSum,
    *,
    federation: str,
    census: PooledCensus,
    num_channels: int,
    reference: bytes = b"",
) -> SecureSum:
    cohort = cohort_of(federation, str(key), census.keys, census.keys)
    size = num_words(asked.question, num_channels=num_channels, num_cases=census.num_cases)
    # How much a site samples follows from the number of all cases: where the others were told another one, so that they
    # sample next to nothing, the sum would be that of one site.
    about = digest_of(canonical_json(asked.model_dump(mode="json")), str(census.num_cases).encode(), reference)
    lane = Lane(SUM, cohort.sites, "U64", size, about)
    return SecureSum(cohort, (lane,), len(cohort.sites), dict.fromkeys(cohort.sites, 1))
