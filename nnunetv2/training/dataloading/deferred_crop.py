"""Choose rotation and scaling before reading, and read only the voxels needed.

A patch that may be turned is loaded larger than the network sees it: 205 voxels per axis for 128, which is 4 times as
many. Two thirds of the patches are neither turned nor scaled in the end, only cropped to the middle. The spatial
transform draws its parameters from the shape of its input alone, so it can be asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor

from nnunetv2.training.data_augmentation.spatial import BoundarySpatialTransform, SpatialTransform, needed_box
from nnunetv2.training.dataloading.patch_reading import overlaps

Box = tuple[list[int], list[int]]
ReadBox = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]


class SpatialStep(NamedTuple):
    """A pipeline of transforms, cut after its spatial transform."""

    before: list[BasicTransform]
    spatial: SpatialTransform
    after: list[BasicTransform]
    """The step or steps that undo `before`."""
    rest: list[BasicTransform]


def split_off_spatial(transforms: Any) -> SpatialStep | None:
    """Find the spatial transform that a pipeline begins with.

    It stands there alone, or in the conversion for thin patches.

    None if the pipeline begins differently, or if the transform may look at more than the shape of the image: then it
    must be given the whole patch.
    """
    if type(transforms) is not ComposeTransforms or not transforms.transforms:
        return None
    pipeline = list(transforms.transforms)
    num_before = 1 if type(pipeline[0]) is Convert3DTo2DTransform else 0
    before, after = pipeline[:num_before], pipeline[num_before + 1 : 2 * num_before + 1]
    spatial: Any = pipeline[num_before] if len(pipeline) > num_before else None
    if type(spatial) not in (SpatialTransform, BoundarySpatialTransform):
        return None
    if before and [type(transform) for transform in after] != [Convert2DTo3DTransform]:
        return None
    if spatial.random_crop or any(callable(setting) for setting in vars(spatial).values()):
        return None
    return SpatialStep(before, spatial, after, pipeline[2 * num_before + 1 :])


def central_box(lower: Sequence[int], upper: Sequence[int], size: Sequence[int]) -> Box | None:
    """Return the box of `size` in the middle of a box.

    None if it does not fit in. It is about the last axes.

    The middle is where the spatial transform crops: the centre of an even length is right of the middle.
    """
    inner_lower, inner_upper = list(lower), list(upper)
    for axis in range(-len(size), 0):
        length = upper[axis] - lower[axis]
        if length < size[axis]:
            return None
        inner_lower[axis] = lower[axis] + length // 2 - size[axis] // 2
        inner_upper[axis] = inner_lower[axis] + size[axis]
    return inner_lower, inner_upper


def read_and_transform(
    step: SpatialStep, read: ReadBox, lower: Sequence[int], upper: Sequence[int], image_shape: Sequence[int]
) -> dict:
    """Draw the spatial transform, read the voxels it needs, apply the pipeline.

    The random numbers and the outcome are those of reading the whole box and calling the pipeline.

    Args:
        read: Returns image and labels of a box, without the first axis if the network is 2D.
        lower, upper: The box that is large enough for any outcome, three axes.
        image_shape: Spatial shape of the case.
    """
    num_axes = len(step.spatial.patch_size)
    shape = [high - low for low, high in zip(lower, upper)][-num_axes:]
    shape_only = torch.empty(()).expand(1, *shape)
    parameters = step.spatial.get_parameters(image=shape_only)
    if parameters["grid"] is None and parameters["affine"] is None:
        box = central_box(lower, upper, step.spatial.patch_size)
        is_cropped = box is not None
    else:
        box, is_cropped = _sampled_box(step.spatial, parameters, lower, upper), False
    if box is None or not overlaps(*box, image_shape):
        box, is_cropped = (list(lower), list(upper)), False
    image, labels = read(*box)
    sample = {"image": image, "segmentation": labels}
    if not is_cropped:
        start = [first - low for first, low in zip(box[0], lower)][-num_axes:]
        sample = _turn(step, sample, {**parameters, "source_shape": shape, "source_start": start})
    for transform in step.rest:
        sample = transform(**sample)
    return sample


def _sampled_box(spatial: SpatialTransform, parameters: dict, lower: Sequence[int], upper: Sequence[int]) -> Box | None:
    """Return the part of a box that a drawn rotation or scaling draws on; None if that is not known."""
    grid = spatial.affine_grid(parameters) if isinstance(spatial, BoundarySpatialTransform) else None
    if grid is None:
        return None
    inner_lower, inner_upper = list(lower), list(upper)
    shape = [high - low for low, high in zip(lower, upper)][-len(grid.patch) :]
    for axis, first, last in zip(range(-len(shape), 0), *needed_box(grid, shape)):
        inner_lower[axis], inner_upper[axis] = lower[axis] + first, lower[axis] + last
    return inner_lower, inner_upper


def _turn(step: SpatialStep, sample: dict, parameters: dict) -> dict:
    for transform in step.before:
        sample = transform(**sample)
    sample = step.spatial.apply(sample, **parameters)
    for transform in step.after:
        sample = transform(**sample)
    return sample
