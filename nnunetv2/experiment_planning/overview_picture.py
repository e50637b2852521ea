"""Draw a dataset's properties on one page.

Shapes, spacings, label sizes and intensities per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nnunetv2.experiment_planning.dataset_look import DatasetOverview

# Okabe and Ito's colours, which people who see few colours can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#5a5a5a"
MAX_LABELS, MAX_CHANNELS, COLUMNS = 24, 9, 3
_ROW_INCHES, _LABEL_INCHES = 3.4, 0.22


def draw_overview(overview: DatasetOverview) -> Figure:
    """Return the page: geometry and labels above, one panel per channel below."""
    from matplotlib.figure import Figure

    num_channels = min(len(overview.channel_names), MAX_CHANNELS)
    rows = ceil(num_channels / COLUMNS)
    top = max(_ROW_INCHES, 1.2 + _LABEL_INCHES * min(len(overview.labels), MAX_LABELS))
    figure = Figure(figsize=(13, 0.6 + top + _ROW_INCHES * rows), layout="constrained")
    figure.suptitle(_title(overview), fontsize=13)
    above, below = figure.subfigures(2, 1, height_ratios=[top, _ROW_INCHES * rows])
    shapes, spacings, labels = above.subplots(1, 3)
    _draw_per_axis(shapes, overview.shapes, "Shape after cropping", "voxels", BLUE)
    _draw_per_axis(spacings, overview.spacings, "Spacing", "mm", ORANGE)
    _draw_labels(labels, overview)
    panels = below.subplots(rows, min(num_channels, COLUMNS), squeeze=False).ravel()
    for channel, panel in enumerate(panels[:num_channels]):
        _draw_intensities(panel, overview, channel)
    for panel in panels[num_channels:]:
        panel.set_visible(False)
    return figure


def _title(overview: DatasetOverview) -> str:
    looked_at = len(overview.looks)
    seen = "" if looked_at == overview.num_cases else f" (labels and intensities: {looked_at} of them)"
    hidden = len(overview.channel_names) - MAX_CHANNELS
    more = f", {hidden} not shown" if hidden > 0 else ""
    return (
        f"{overview.dataset_name}: {overview.num_cases} training cases{seen}, "
        f"{len(overview.channel_names)} channel(s){more}, {len(overview.labels)} label(s)"
    )


def _draw_per_axis(axes: Axes, values: np.ndarray, title: str, unit: str, colour: str) -> None:
    """Draw a dot per case and the median, for each of the three axes."""
    rng = np.random.default_rng(0)
    for axis, of_axis in enumerate(values.T):
        axes.scatter(axis + rng.uniform(-0.18, 0.18, len(of_axis)), of_axis, s=14, alpha=0.45, color=colour, lw=0)
        median = float(np.median(of_axis))
        axes.plot([axis - 0.32, axis + 0.32], [median, median], color="black", lw=1.5)
        axes.annotate(f"{median:.4g}", (axis + 0.34, median), va="center", fontsize=9)
    _use_log_scale_if_wide(axes, "y", values)
    axes.set_xticks(range(values.shape[1]), [f"axis {axis}" for axis in range(values.shape[1])])
    axes.set_xlim(-0.5, values.shape[1] - 0.2)
    _finish(axes, f"{title} [{unit}]", grid_axis="y")


def _draw_labels(axes: Axes, overview: DatasetOverview) -> None:
    """Draw a line of dots per label, its median, and in how many cases it occurs."""
    names = list(overview.labels)[:MAX_LABELS]
    sizes = [overview.label_sizes(name) for name in names]
    for row, of_label in enumerate(sizes):
        present = of_label[of_label > 0]
        axes.scatter(present, np.full(len(present), row), s=14, alpha=0.45, color=GREEN, lw=0)
        if len(present):
            axes.plot(np.median(present), row, marker="|", ms=11, mew=1.8, color="black")
        axes.annotate(
            f"{len(present)}/{len(of_label)}",
            (1.02, row),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            color=ORANGE if len(present) < len(of_label) else GREY,
        )
    _use_log_scale_if_wide(axes, "x", np.concatenate(sizes) if sizes else [])
    axes.set_yticks(range(len(names)), [_shorten(name) for name in names], fontsize=9)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    hidden = len(overview.labels) - len(names)
    title = f"Label size [{'pixels' if overview.is_2d else 'ml'}], cases with it"
    _finish(axes, title + (f"; {hidden} more labels" if hidden else ""), grid_axis="x")


def _draw_intensities(axes: Axes, overview: DatasetOverview, channel: int) -> None:
    """Draw the range of foreground intensities of each case, ordered by their median."""
    ranges = np.array([look.intensities[channel] for look in overview.looks])
    order = np.argsort(ranges[:, 2], kind="stable")
    ranges, cases = ranges[order], [overview.looks[place].case for place in order]
    position = np.arange(len(ranges))
    width = float(np.clip(260 / len(ranges), 1.5, 9))
    axes.vlines(position, ranges[:, 0], ranges[:, 4], color=BLUE, alpha=0.3, lw=max(1.0, width / 3))
    axes.vlines(position, ranges[:, 1], ranges[:, 3], color=BLUE, alpha=0.75, lw=width)
    axes.scatter(position, ranges[:, 2], color="black", s=9, zorder=3)
    _use_log_scale_if_wide(axes, "y", ranges[:, 2], from_zero=False)
    for place in find_outliers(ranges[:, 2]):
        side = "right" if place > len(ranges) / 2 else "left"
        axes.annotate(
            f" {_shorten(cases[place])} ", (place, ranges[place, 2]), ha=side, va="center", fontsize=8, color=ORANGE
        )
    axes.set_xticks([])
    axes.set_xlim(-1, len(ranges))
    axes.set_xlabel("cases by median; 0.5 to 99.5 %, 25 to 75 %, median", fontsize=8, color=GREY)
    _finish(axes, f"Foreground of channel {channel}: {_shorten(overview.channel_names[channel])}", grid_axis="y")


def find_outliers(values: np.ndarray, at_most: int = 3) -> list[int]:
    """Return the places of values far from all others.

    More than 10 times the median deviation from the median.
    """
    distance = np.abs(values - np.median(values))
    typical = max(float(np.median(distance)), 1e-9 * float(np.abs(values).max(initial=0)))
    farthest = np.argsort(-distance, kind="stable")[:at_most]
    return [int(place) for place in farthest if distance[place] > 10 * typical]


def _use_log_scale_if_wide(
    axes: Axes, direction: str, values: Sequence | np.ndarray, *, from_zero: bool = True
) -> None:
    """Use a logarithmic scale for values that span more than a factor of 30, linear around 0 unless `from_zero`.

    Args:
        direction: "x" or "y".
        from_zero: All values are sizes; a linear scale starts at 0.
    """
    set_scale = axes.set_xscale if direction == "x" else axes.set_yscale
    sizes = np.abs(np.asarray(values, dtype=float))
    sizes = sizes[sizes > 0]
    is_wide = len(sizes) > 0 and sizes.max() / sizes.min() > 30
    if is_wide and from_zero:
        set_scale("log")
    elif is_wide:
        set_scale("symlog", linthresh=float(np.median(sizes)))
    elif from_zero and direction == "x":
        axes.set_xlim(left=0)
    elif from_zero:
        axes.set_ylim(bottom=0)


def _finish(axes: Axes, title: str, *, grid_axis: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis=grid_axis, color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shorten(text: str, at_most: int = 24) -> str:
    # $ would start a formula
    text = str(text).replace("$", r"\$")
    return text if len(text) <= at_most else f"{text[: at_most - 1]}…"
