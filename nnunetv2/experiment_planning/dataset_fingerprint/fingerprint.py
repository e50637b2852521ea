"""Turn samples of all cases into the fingerprint of the dataset.

It is a plain dict that JSON can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample, WeightedValues
from nnunetv2.federated.aggregation import (
    fingerprint_statistics,  # one centre is pooled like several: by counts, exactly
)


def compute_fingerprint(samples: Sequence[CaseSample]) -> dict:
    """Compute the content of dataset_fingerprint.json; channels are numbered with ints.

    Raises:
        ValueError: No case has foreground, or cases differ in their number of channels.
    """
    channel_counts = {len(sample.intensities) for sample in samples}
    if len(channel_counts) != 1:
        raise ValueError(f"cases differ in their number of channels: {sorted(channel_counts)}")
    if not any(sample.has_foreground for sample in samples):
        raise ValueError("no case has foreground (a label above 0), so there are no intensities to describe")
    return {
        "spacings": [sample.spacing for sample in samples],
        "shapes_after_crop": [sample.shape_after_crop for sample in samples],
        "foreground_intensity_properties_per_channel": {
            channel: describe_intensities([sample.intensities[channel] for sample in samples])
            for channel in range(channel_counts.pop())
        },
        "median_relative_size_after_cropping": float(np.median([sample.relative_size for sample in samples])),
    }


def describe_intensities(samples: Sequence[WeightedValues]) -> Mapping[str, float]:
    """Describe one channel of all cases in seven numbers.

    Mean, median, std, min, max and the outer half percents.

    The numbers have the precision of the expanded sample as the reference release would concatenate it: float32,
    but float64 as soon as one case has no foreground, since its empty list promotes the others.
    """
    dtype = np.float32 if all(len(values) for values, _ in samples) else np.float64
    drawn = [sample for sample in samples if len(sample[0])]
    coarse = fingerprint_statistics.pool_histograms(
        fingerprint_statistics.coarse_histogram(values, counts) for values, counts in drawn
    )
    bins = fingerprint_statistics.wanted_bins(coarse)
    fine = fingerprint_statistics.pool_histograms(
        fingerprint_statistics.fine_histogram(values, bins, counts) for values, counts in drawn
    )
    low, median, high = fingerprint_statistics.pooled_percentiles(coarse, fine, promotes_to_float64=dtype is np.float64)
    moments = reduce(
        fingerprint_statistics.Moments.merge,
        (fingerprint_statistics.Moments.of(values, counts) for values, counts in drawn),
    )
    return {
        "mean": float(dtype(moments.mean)),
        "median": median,
        "std": float(dtype(moments.std)),
        "min": float(min(values.min() for values, _ in drawn)),
        "max": float(max(values.max() for values, _ in drawn)),
        "percentile_99_5": high,
        "percentile_00_5": low,
    }
