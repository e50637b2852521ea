"""Feed the previous stage's labels of a cascade to the network.

They are made as imperfect as in real use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform
from scipy import ndimage

BinaryOperation = Callable[[np.ndarray, np.ndarray], np.ndarray]


def dilation(mask: np.ndarray, element: np.ndarray) -> np.ndarray:
    """Grow a mask by a structuring element."""
    return ndimage.binary_dilation(mask, element)


def erosion(mask: np.ndarray, element: np.ndarray) -> np.ndarray:
    """Shrink a mask by a structuring element, except from the patch's edge.

    Behind the edge it may go on.
    """
    return ndimage.binary_erosion(mask, element, border_value=1)


def closing(mask: np.ndarray, element: np.ndarray) -> np.ndarray:
    """Fill gaps that are smaller than a structuring element."""
    return erosion(dilation(mask, element), element)


def opening(mask: np.ndarray, element: np.ndarray) -> np.ndarray:
    """Remove parts that are smaller than a structuring element."""
    return dilation(erosion(mask, element), element)


def ball(radius: int, num_axes: int) -> np.ndarray:
    """Return a ball, a disk in 2D, as booleans.

    Its side is 2 radius + 1.
    """
    distances = np.indices((2 * radius + 1,) * num_axes) - radius
    return (distances**2).sum(0) <= radius**2


def _as_list(channels: int | Sequence[int]) -> list[int]:
    return [channels] if isinstance(channels, int) else list(channels)


class MoveSegAsOneHotToData(AbstractTransform):
    """Append one indicator channel per label to `data` `(b, c, *spatial)`.

    It is 1 where a channel of `seg` has that label.

    Args:
        index_in_origin: The channel of the labels.
        all_labels: The labels, in the order of the new channels.
        remove_from_origin: Take the channel out of `seg`.
    """

    def __init__(
        self,
        index_in_origin: int,
        all_labels: Sequence[int],
        key_origin: str = "seg",
        key_target: str = "data",
        remove_from_origin: bool = True,
    ) -> None:
        self.index_in_origin = index_in_origin
        self.all_labels = all_labels
        self.key_origin = key_origin
        self.key_target = key_target
        self.remove_from_origin = remove_from_origin

    def __call__(self, **data_dict) -> dict:
        origin, target = data_dict[self.key_origin], data_dict[self.key_target]
        labels = origin[:, self.index_in_origin]
        one_hot = np.stack([labels == label for label in self.all_labels], axis=1).astype(target.dtype)
        data_dict[self.key_target] = np.concatenate([target, one_hot], axis=1)
        if self.remove_from_origin:
            data_dict[self.key_origin] = np.delete(origin, self.index_in_origin, axis=1)
        return data_dict


class RemoveRandomConnectedComponentFromOneHotEncodingTransform(AbstractTransform):
    """Remove one connected component from some of the label channels `channel_idx`.

    Args:
        p_per_sample: Share of the samples that are changed.
        fill_with_other_class_p: Chance that the component becomes another label, not background.
        dont_do_if_covers_more_than_x_percent: Components that take up a larger share (0 to 1) of the patch stay.
        p_per_label: Share of the labels that are changed in such a sample.
    """

    def __init__(
        self,
        channel_idx: int | Sequence[int],
        key: str = "data",
        p_per_sample: float = 0.2,
        fill_with_other_class_p: float = 0.25,
        dont_do_if_covers_more_than_x_percent: float = 0.25,
        p_per_label: float = 1,
    ) -> None:
        self.channel_idx = _as_list(channel_idx)
        self.key = key
        self.p_per_sample = p_per_sample
        self.fill_with_other_class_p = fill_with_other_class_p
        self.dont_do_if_covers_more_than_x_percent = dont_do_if_covers_more_than_x_percent
        self.p_per_label = p_per_label

    def __call__(self, **data_dict) -> dict:
        for sample in data_dict[self.key]:
            if np.random.uniform() < self.p_per_sample:
                for channel in np.random.permutation(self.channel_idx):
                    if np.random.uniform() < self.p_per_label:
                        self._remove_component_(sample, channel)
        return data_dict

    def _remove_component_(self, sample: np.ndarray, channel: int) -> None:
        components, number = ndimage.label(sample[channel] != 0, np.ones((3,) * (sample.ndim - 1)))
        sizes = np.bincount(components.ravel())[1 : number + 1]
        largest_allowed = self.dont_do_if_covers_more_than_x_percent * components.size
        removable = np.flatnonzero(sizes < largest_allowed) + 1
        if len(removable) == 0:
            return
        component = components == np.random.choice(removable)
        sample[channel][component] = 0
        others = [other for other in self.channel_idx if other != channel]
        if others and np.random.uniform() < self.fill_with_other_class_p:
            sample[np.random.choice(others)][component] = 1


class ApplyRandomBinaryOperatorTransform(AbstractTransform):
    """Grow, shrink, close or open label channels `channel_idx` at random.

    A voxel keeps at most one label.

    Args:
        p_per_sample: Share of the samples that are changed.
        any_of_these: Functions of a mask and a structuring element, one of which is drawn.
        strel_size: Range of the radius of the structuring element in voxels, both ends included.
        p_per_label: Share of the labels that are changed in such a sample.
    """

    def __init__(
        self,
        channel_idx: int | Sequence[int],
        p_per_sample: float = 0.3,
        any_of_these: Sequence[BinaryOperation] = (dilation, erosion, closing, opening),
        key: str = "data",
        strel_size: tuple[int, int] = (1, 10),
        p_per_label: float = 1,
    ) -> None:
        self.channel_idx = _as_list(channel_idx)
        self.p_per_sample = p_per_sample
        self.any_of_these = any_of_these
        self.key = key
        self.strel_size = strel_size
        self.p_per_label = p_per_label

    def __call__(self, **data_dict) -> dict:
        for sample in data_dict[self.key]:
            if np.random.uniform() < self.p_per_sample:
                for channel in np.random.permutation(self.channel_idx):
                    if np.random.uniform() < self.p_per_label:
                        self._change_shape_(sample, channel)
        return data_dict

    def _change_shape_(self, sample: np.ndarray, channel: int) -> None:
        operation = self.any_of_these[np.random.choice(len(self.any_of_these))]
        radius = np.random.randint(self.strel_size[0], self.strel_size[1] + 1)
        before = sample[channel] != 0
        after = operation(before, ball(radius, before.ndim)).astype(bool)
        sample[channel] = after
        for other in self.channel_idx:
            if other != channel:
                sample[other][after & ~before] = 0
