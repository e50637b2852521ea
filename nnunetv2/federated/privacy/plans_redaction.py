"""Replace per-channel minimum and maximum in plans by percentiles before they leave.

nnU-Net writes both into its plans and uses neither: normalization goes by mean, standard deviation and percentiles, or
by the image's own range. Plans that sites make together hold bounds of histograms there, but a site cannot prove of a
file that it is one of those. So all plans of registrations have percentiles in their place, and are compared that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATISTICS = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")
"""Fields of plans that hold statistics per channel; the second in old plans."""
STAND_INS = {"min": "percentile_00_5", "max": "percentile_99_5"}


def without_extrema(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return plans with percentiles in the place of each channel's extrema."""
    return {
        field: {channel: _stand_in(properties) for channel, properties in value.items()}
        if field in STATISTICS and isinstance(value, Mapping)
        else value
        for field, value in plans.items()
    }


def _stand_in(properties: Any) -> Any:
    """Replace the extrema of a channel; without percentiles, leave them out."""
    if not isinstance(properties, Mapping):
        return properties  # no plans of nnU-Net's; the coordinator compares what anybody sends
    kept = {name: value for name, value in properties.items() if name not in STAND_INS or STAND_INS[name] in properties}
    return {name: properties[STAND_INS[name]] if name in STAND_INS else value for name, value in kept.items()}
