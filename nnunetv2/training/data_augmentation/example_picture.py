"""Draw a few augmented patches with their labels.

Wrong data is seen there before it is trained on.

One row per sample, one panel per view and channel: slices along the axes of a volume, or the image itself in 2D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CHANNELS = 4
PANEL_INCHES = 2.4
DOTS_PER_INCH = 100
FILL_OPACITY = 0.2
OUTLINE_OPACITY = 0.9
SHOWN_PERCENTILES = (0.5, 99.5)
COLORMAP = "tab10"


class Sample(NamedTuple):
    """A patch as the network sees it."""

    key: str
    image: np.ndarray
    """`(c, *spatial)`."""
    masks: dict[str, np.ndarray]
    """Name -> bool map `(*spatial)`, per label or region that occurs."""


class View(NamedTuple):
    """A slice to show."""

    axis: int | None
    """The axis it is perpendicular to; None for a 2D image."""
    index: int

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """Return the slice of an array whose last axes are the spatial ones."""
        return volume if self.axis is None else np.take(volume, self.index, axis=volume.ndim - 3 + self.axis)

    @property
    def title(self) -> str:
        """Name the slice."""
        return "image" if self.axis is None else f"axis {self.axis}, slice {self.index}"


def save_augmentation_examples(
    path: str | Path,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_samples: int = 6,
    spacing: Sequence[float] | None = None,
    names: Mapping[Any, str] | None = None,
) -> None:
    """Draw samples of some batches into a PNG file, those with the most foreground first.

    Args:
        batches: As the data loader gives them: `data` `(b, c, *spatial)`; `target` a label map `(b, 1, *spatial)`, or a
            bool map per region `(b, r, *spatial)`, or a list of targets, full resolution first; `keys` if known.
        spacing: Of the voxels, one per spatial axis, so that slices are drawn in their true proportions.
        names: Names of labels (ints); in a training with regions, names of regions, by their number.
    """
    samples = [sample for batch in batches for sample in _unpack(batch, names or {})]
    if not samples:
        raise ValueError("there is no sample to draw")
    samples.sort(key=_foreground_voxels, reverse=True)
    figure = _draw(samples[:max_samples], spacing)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 1})


def _unpack(batch: Mapping[str, Any], names: Mapping[Any, str]) -> list[Sample]:
    target = batch["target"]
    targets = target[0] if isinstance(target, (list, tuple)) else target
    images = np.asarray(batch["data"], dtype=np.float32)
    keys = batch.get("keys", [f"sample {number}" for number in range(len(images))])
    return [
        Sample(str(key), image, _named_masks(np.asarray(labels), names))
        for key, image, labels in zip(keys, images, targets)
    ]


def _named_masks(target: np.ndarray, names: Mapping[Any, str]) -> dict[str, np.ndarray]:
    """Return a map per label above 0, or per region; those that are nowhere are left out."""
    if target.dtype == bool:
        return {
            str(names.get(number, f"region {number}")): region for number, region in enumerate(target) if region.any()
        }
    labels = [int(label) for label in np.unique(target[0]) if label > 0]
    return {str(names.get(label, f"label {label}")): target[0] == label for label in labels}


def _foreground_voxels(sample: Sample) -> int:
    return int(np.logical_or.reduce(list(sample.masks.values())).sum()) if sample.masks else 0


def choose_views(masks: Iterable[np.ndarray], shape: Sequence[int]) -> list[View]:
    """Return the slice with most foreground along each of three axes.

    It is the middle one where there is none.

    A 2D image is its own view.
    """
    if len(shape) == 2:
        return [View(None, 0)]
    amount = sum((mask.astype(np.float32) for mask in masks), np.zeros(shape, np.float32))
    views = []
    for axis, length in enumerate(shape):
        profile = amount.sum(tuple(other for other in range(3) if other != axis))
        views.append(View(axis, int(profile.argmax()) if profile.any() else length // 2))
    return views


def overlay(image: np.ndarray, masks: Sequence[np.ndarray], colors: Sequence[Sequence[float]]) -> np.ndarray:
    """Paint masks over a grey image: filled lightly, outlined strongly.

    Args:
        image: `(rows, columns)`, from 0 (black) to 1.
        masks: Bool, of the same shape.
        colors: Red, green and blue (0 to 1) of each.

    Returns:
        `(rows, columns, 3)`.
    """
    painted = np.repeat(image[..., None], 3, axis=2)
    for mask, color in zip(masks, colors):
        opacity = np.where(_outline(mask), OUTLINE_OPACITY, FILL_OPACITY * mask)[..., None]
        painted = (1 - opacity) * painted + opacity * np.asarray(color)
    return painted


def _outline(mask: np.ndarray) -> np.ndarray:
    """Mark the voxels of a mask that touch its outside. Beyond the edge of the image it is taken to go on."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def stretch(image: np.ndarray) -> np.ndarray:
    """Scale intensities to 0 to 1.

    A few extreme ones are cut off; voxels that are NaN become 1.
    """
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return np.ones_like(image)
    low, high = np.percentile(finite, SHOWN_PERCENTILES)
    return np.nan_to_num(np.clip((image - low) / max(high - low, 1e-8), 0, 1), nan=1.0)


def _draw(samples: Sequence[Sample], spacing: Sequence[float] | None) -> Figure:
    # Not pyplot, whose global state belongs to the user.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_channels = min(MAX_CHANNELS, max(len(sample.image) for sample in samples))
    num_views = 1 if samples[0].image.ndim == 3 else 3
    columns = num_channels * num_views
    figure = Figure(
        (PANEL_INCHES * columns + 1, PANEL_INCHES * len(samples) * 1.15 + 0.6), dpi=DOTS_PER_INCH, layout="constrained"
    )
    FigureCanvasAgg(figure)
    colors = _choose_colors(samples)
    axes = figure.subplots(len(samples), columns, squeeze=False)
    for row, sample in zip(axes, samples):
        _draw_row(row, sample, colors, num_channels, spacing)
    _draw_legend(figure, colors)
    return figure


def _draw_row(
    row: Sequence[Axes],
    sample: Sample,
    colors: Mapping[str, Sequence[float]],
    num_channels: int,
    spacing: Sequence[float] | None,
) -> None:
    shown = sample.image[:num_channels]
    panels = iter(row)
    for view in choose_views(sample.masks.values(), sample.image.shape[1:]):
        masks = [view.cut(mask) for mask in sample.masks.values()]
        for number, channel in enumerate(shown):
            axes = next(panels)
            # The contrast of the whole patch, so that a nearly empty slice looks empty.
            image = view.cut(stretch(channel))
            axes.imshow(
                overlay(image, masks, [colors[name] for name in sample.masks]),
                interpolation="nearest",
                aspect=_aspect(view, spacing),
            )
            axes.set_title(
                f"{view.title}, channel {number}\n{channel.min():.3g} to {channel.max():.3g}, "
                f"mean {channel.mean():.3g}",
                fontsize=6,
            )
            axes.set_xticks([])
            axes.set_yticks([])
    row[0].set_ylabel(f"{sample.key}\n{_foreground_voxels(sample)} voxels of foreground", fontsize=7)
    for axes in panels:
        axes.set_axis_off()


def _aspect(view: View, spacing: Sequence[float] | None) -> float:
    """Return the height of a voxel relative to its width."""
    if spacing is None:
        return 1.0
    rows, columns = [size for axis, size in enumerate(spacing) if axis != view.axis][-2:]
    return float(rows) / float(columns)


def _choose_colors(samples: Sequence[Sample]) -> dict[str, tuple[float, float, float]]:
    from matplotlib import colormaps

    names = sorted({name for sample in samples for name in sample.masks}, key=lambda name: (len(name), name))
    palette: Any = colormaps[COLORMAP]
    palette = palette.colors
    return {name: palette[number % len(palette)] for number, name in enumerate(names)}


def _draw_legend(figure: Figure, colors: Mapping[str, tuple[float, float, float]]) -> None:
    from matplotlib.patches import Patch

    if not colors:
        figure.suptitle("none of these patches shows any foreground", fontsize=8)
        return
    handles = [Patch(color=color, label=name) for name, color in list(colors.items())[:40]]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)), fontsize=7, frameon=False)
