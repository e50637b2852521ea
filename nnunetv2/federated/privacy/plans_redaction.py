"""Redact statistics of a site's own data from plans before they leave.

Replace per-channel minimum and maximum by percentiles, everywhere.

nnU-Net writes both into its plans and uses neither: normalization goes by mean, standard deviation and percentiles, or
by the image's own range. Plans that sites make together hold bounds of histograms there, but a site cannot prove of a
file that it is one of those. So all plans of registrations have percentiles in their place, and are compared that way.

Where a federation masks its statistics, plans that a site has made alone lose theirs as well: all that describes the
intensities, and the medians of its spacings and shapes. Those of the pooled fingerprint are everybody's, and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATISTICS = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")
"""Fields of plans that hold statistics per channel; the second in old plans."""
MEDIANS = ("original_median_spacing_after_transp", "original_median_shape_after_transp")
MEDIAN_OF_CONFIGURATION = "median_image_size_in_voxels"
"""Fields that hold medians of the shapes and spacings of all cases."""
WITHHELD = "statistics_withheld"
"""Field that says so in plans that have lost theirs. No model that others could use is made of such plans."""
STAND_INS = {"min": "percentile_00_5", "max": "percentile_99_5"}


def without_extrema(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return plans with percentiles in the place of each channel's extrema."""
    return {
        field: {channel: _stand_in(properties) for channel, properties in value.items()}
        if field in STATISTICS and isinstance(value, Mapping)
        else value
        for field, value in plans.items()
    }


def without_own_statistics(plans: Mapping[str, Any], pooled: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return plans without statistics, unless these are those that all sites have pooled.

    Args:
        pooled: The pooled fingerprint, if this site has one.
    """
    field = STATISTICS[0]
    if pooled is not None and field in plans and plans[field] == pooled.get(field):
        return dict(plans)
    kept = {name: value for name, value in plans.items() if name not in (*STATISTICS, *MEDIANS)}
    configurations = plans.get("configurations", {})
    return {
        **kept,
        "configurations": {
            name: {field: value for field, value in described.items() if field != MEDIAN_OF_CONFIGURATION}
            for name, described in configurations.items()
        },
        WITHHELD: True,
    }


def _stand_in(properties: Any) -> Any:
    """Replace the extrema of a channel; without percentiles, leave them out."""
    if not isinstance(properties, Mapping):
        return properties  # no plans of nnU-Net's; the coordinator compares plans from anybody
    kept = {name: value for name, value in properties.items() if name not in STAND_INS or STAND_INS[name] in properties}
    return {name: properties[STAND_INS[name]] if name in STAND_INS else value for name, value in kept.items()}
