"""Hints about images that a plan can do little with."""

import pytest

from nnunetv2.experiment_planning.experiment_planners.hints import describe_flat_axes


@pytest.mark.parametrize(("shape", "forward"), [((1, 48, 64), (0, 1, 2)), ((20, 48, 64), (2, 0, 1))])
def test_single_slices_and_volumes_need_no_hint(shape, forward):
    assert describe_flat_axes(shape, forward) is None


@pytest.mark.parametrize(
    ("shape", "forward", "shown", "axis"),
    [
        ((64, 48, 1), (0, 1, 2), "64 x 48 x 1", "axis 2."),
        ((64, 1, 48), (1, 0, 2), "1 x 64 x 48", "axis 0."),
        ((64, 1, 1), (0, 1, 2), "64 x 1 x 1", "axis 1 and 2."),
    ],
)
def test_the_axis_is_that_of_the_array(shape, forward, shown, axis):
    hint = describe_flat_axes(shape, forward)
    assert shown in hint
    assert axis in hint
