"""Blur and gamma: the library's transforms, drawn alike and applied several times faster.

They are subclasses, so code that looks for `GaussianBlurTransform` or `GammaTransform` in a pipeline finds them.
"""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from torch import Tensor

WIDTH_IN_SIGMAS = 6
SMALLEST_RANGE = 1e-7
CHUNK = 16_384
"""Numbers that are added up in float32 before float64 takes over."""


class SeparableBlurTransform(GaussianBlurTransform):
    """Blur along one axis after the other, by adding shifted copies.

    A kernel of sigma 1 has 7 entries: convolution routines are made for other sizes, and Fourier space too. `benchmark`
    is accepted, but there is nothing to find out by timing.
    """

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        channels = params["apply_to_channel"].nonzero().flatten().tolist()
        for number, channel in enumerate(channels):
            sigmas = params["sigmas"] if self.synchronize_channels else params["sigmas"][number]
            kernels = [gaussian_kernel(float(sigma)) for sigma in sigmas]
            img[channel] = torch.from_numpy(blur(img[channel].numpy(), kernels))
        return img


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Return a symmetric float32 kernel with sum 1, six sigmas wide.

    Its length is the nearest odd one.
    """
    wanted = WIDTH_IN_SIGMAS * sigma + 0.5
    length = round(wanted)
    if length % 2 == 0:
        length += 1 if wanted >= length else -1
    distance = np.arange(length) - (length - 1) / 2
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, kernels: list[np.ndarray]) -> np.ndarray:
    """Convolve an image of 2 or 3 axes with one kernel per axis.

    It is mirrored at its edges; the result is float32.
    """
    if image.ndim == 2:
        return _blur_plane(image, *kernels)
    first, *plane_kernels = kernels
    radius, length = len(first) // 2, len(image)
    result = np.empty(image.shape, np.float32)
    spare = np.empty(image.shape[1:], np.float32)
    for index, plane in enumerate(result):
        # Slice by slice, so that the working set stays in the cache.
        np.multiply(image[index], first[radius], out=plane)
        for step in range(1, radius + 1):
            before, after = (_reflect(index + sign * step, length) for sign in (-1, 1))
            np.add(image[before], image[after], out=spare)
            spare *= first[radius - step]
            plane += spare
        plane[...] = _blur_plane(plane, *plane_kernels)
    return result


def _blur_plane(plane: np.ndarray, row_kernel: np.ndarray, column_kernel: np.ndarray) -> np.ndarray:
    for axis, kernel in enumerate((row_kernel, column_kernel)):
        radius, length = len(kernel) // 2, plane.shape[axis]
        around = [_reflect(index, length) for index in (*range(-radius, 0), *range(length, length + radius))]
        edges = np.take(plane, around, axis)
        padded = np.concatenate(
            [np.take(edges, range(radius), axis), plane, np.take(edges, range(radius, 2 * radius), axis)], axis
        )

        def shifted(step: int, padded: np.ndarray = padded, axis: int = axis, length: int = length) -> np.ndarray:
            return padded[step : step + length] if axis == 0 else padded[:, step : step + length]

        plane = shifted(radius) * kernel[radius]
        for step in range(radius):
            pair = shifted(step) + shifted(2 * radius - step)
            pair *= kernel[step]
            plane += pair
    return plane


def _reflect(index: int, length: int) -> int:
    """Return the index inside `length` that an index outside mirrors; the edge itself is not repeated."""
    if length == 1:
        return 0
    period = 2 * (length - 1)
    index %= period
    return min(index, period - index)


class FastGammaTransform(GammaTransform):
    """Bend intensities with few passes over the image.

    NumPy's power is vectorised.
    """

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        for number, channel in enumerate(params["apply_to_channel"].tolist()):
            invert = bool(params["invert_image"][number])
            if invert:
                img[channel].neg_()
            bend_(img[channel], float(params["gamma"][number]), keep_statistics=bool(params["retain_stats"][number]))
            if invert:
                img[channel].neg_()
        return img


def bend_(image: Tensor, gamma: float, *, keep_statistics: bool) -> None:
    """Raise an image to a power, scaled to 0 to 1 meanwhile, in place.

    Args:
        keep_statistics: Give the result the mean and the standard deviation that the image had, not its range.
    """
    mean = float(image.mean())
    image.sub_(mean)
    deviation = standard_deviation(image)
    lowest, highest = (float(value) for value in torch.aminmax(image))
    extent = highest - lowest
    image.sub_(lowest).div_(max(extent, SMALLEST_RANGE))
    values = image.numpy()
    np.power(values, np.float32(gamma), out=values)
    if not keep_statistics:
        image.mul_(extent).add_(lowest + mean)
        return
    image.sub_(image.mean())
    bent_deviation = standard_deviation(image) * extent
    image.mul_(extent * deviation / max(bent_deviation, SMALLEST_RANGE)).add_(mean)


def standard_deviation(centred: Tensor) -> float:
    """Return the unbiased standard deviation of numbers with mean 0.

    NaN if there is but one.
    """
    total = sum(float(torch.dot(chunk, chunk)) for chunk in centred.reshape(-1).split(CHUNK))
    return float(np.sqrt(total / (centred.numel() - 1))) if centred.numel() > 1 else float("nan")
