"""Sample and describe the cases of this site, and compare their sizes with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges import plausibility
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.site import results
from nnunetv2.preprocessed_data.fingerprint_files import LOCAL_FINGERPRINT
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.plain_text import show


def sample_locally(extractor: Any, num_cases: int) -> list[CaseSample]:
    """Sample this site's share of `num_cases`; write its local fingerprint."""
    samples = extractor.sample_cases(extractor.num_samples_per_case(num_cases))
    folder = Path(extractor.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json_atomically(extractor.compute_fingerprint(samples), folder / LOCAL_FINGERPRINT)
    return samples


def make_census(extractor: Any, *, share_extrema: bool) -> messages.Census:
    """Describe the dataset as far as the sites must agree on it."""
    description = extractor.dataset_json
    return messages.Census(
        num_cases=extractor.count_cases(),
        labels=description["labels"],
        channel_names=description.get("channel_names") or description["modality"],
        regions_class_order=description.get("regions_class_order"),
        share_extrema=share_extrema,
    )


def intensities_per_channel(samples: Sequence[CaseSample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Join all cases' foreground values: per channel, values (float32) and counts."""
    return [
        (np.concatenate([values for values, _ in channel]), np.concatenate([counts for _, counts in channel]))
        for channel in zip(*(sample.intensities for sample in samples))
    ]


def compare_geometry(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], pooled: messages.PooledFingerprint
) -> None:
    """Compare the sizes of this site's scans with those of the others.

    Args:
        spacings, shapes: Of the cases of this site.
        pooled: With lists of all cases, those of this site among them.

    Raises:
        FederationError: They differ so much that their units must.
    """
    # Of these types, as `results.check_fingerprint` has found.
    pooled_spacings = cast("list[list[float]]", pooled.fingerprint["spacings"])
    pooled_shapes = cast("list[list[int]]", pooled.fingerprint["shapes_after_crop"])
    rest = Counter(zip(map(tuple, pooled_spacings), map(tuple, pooled_shapes)))
    rest -= Counter(zip(map(tuple, spacings), map(tuple, shapes)))
    if rest:
        _compare(plausibility.Geometry.of(spacings, shapes), plausibility.Geometry.of(*zip(*rest.elements())), "there")


def compare_geometry_with_medians(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], statistics: results.GeometryStatistics
) -> None:
    """Compare the sizes of this site's scans with the medians of all sites."""
    spacing, shape = statistics.spacings.median, statistics.shapes_after_crop.median
    extent = tuple(edge * length for edge, length in zip(spacing, shape, strict=True))
    _compare(plausibility.Geometry.of(spacings, shapes), plausibility.Geometry(spacing, extent), "at all sites")


def _compare(here: plausibility.Geometry, others: plausibility.Geometry, where: str) -> None:
    factor = here.factor_to(others)
    if not plausibility.is_at_least(factor, plausibility.ODD_FACTOR):
        return
    spacing, extent = (
        f"{plausibility.in_mm(own_lengths)} here, {plausibility.in_mm(their_lengths)} {where}"
        for own_lengths, their_lengths in ((here.spacing, others.spacing), (here.extent, others.extent))
    )
    line = (
        f"The scans of this site are {plausibility.describe_factor(factor)} than those of the others: median "
        f"spacing {spacing}; median extent {extent}"
    )
    if plausibility.is_at_least(factor, plausibility.IMPOSSIBLE_FACTOR):
        raise FederationError(
            f"{line}. They cannot all have spacings in millimetres: look at the images' headers, "
            "here and with the others, before anything is preprocessed"
        )
    show(
        f"{line}. Is that right? If units are mixed up, stop, mend the headers, and tell the coordinating site.",
        flush=True,
    )
