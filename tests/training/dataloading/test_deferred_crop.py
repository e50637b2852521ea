"""Which pipelines let a patch be read after its transform is drawn."""

from __future__ import annotations

import pytest
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform

from nnunetv2.training.dataloading.deferred_crop import central_box, split_off_spatial


def spatial(**options) -> SpatialTransform:
    return SpatialTransform((4, 4), 0, **{"random_crop": False, **options})


def test_a_leading_spatial_transform_is_split_off():
    pipeline = [spatial(), MirrorTransform((0,))]
    step = split_off_spatial(ComposeTransforms(pipeline))
    assert (step.before, step.spatial, step.after, step.rest) == ([], pipeline[0], [], pipeline[1:])


def test_the_conversion_of_thin_patches_belongs_to_it():
    pipeline = [Convert3DTo2DTransform(), spatial(), Convert2DTo3DTransform(), MirrorTransform((0,))]
    step = split_off_spatial(ComposeTransforms(pipeline))
    assert [step.before, [step.spatial], step.after, step.rest] == [[item] for item in pipeline]


class Custom(SpatialTransform):
    pass


@pytest.mark.parametrize(
    "transforms",
    [
        None,
        MirrorTransform((0,)),
        ComposeTransforms([]),
        ComposeTransforms([MirrorTransform((0,)), spatial()]),
        ComposeTransforms([Convert3DTo2DTransform()]),
        ComposeTransforms([Convert3DTo2DTransform(), spatial(), MirrorTransform((0,))]),
        ComposeTransforms([spatial(random_crop=True)]),
        ComposeTransforms([spatial(rotation=lambda image, dim: image.mean())]),
        ComposeTransforms([Custom((4, 4), 0, False)]),
    ],
)
def test_any_other_pipeline_gets_the_whole_patch(transforms):
    assert split_off_spatial(transforms) is None


def test_the_middle_is_where_the_transform_crops():
    assert central_box([10, 0, -3], [11, 9, 5], (4, 3)) == ([10, 2, 0], [11, 6, 3])
    assert central_box([0], [5], (6,)) is None
