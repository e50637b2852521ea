"""Distances and regions of label maps small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.annotation_audit.disagreement import Figures, compare, distance_mm, offset_mm, surface_mm2

SPACING = (3.0, 1.5, 1.0)
CLASSES = {"organ": (1,), "lesion": (2,)}


def make_box(start, stop, *, shape=(12, 24, 30), label=1):
    labels = np.zeros(shape, dtype=np.int32)
    labels[tuple(slice(a, b) for a, b in zip(start, stop))] = label
    return labels


ORGAN = make_box((3, 6, 6), (9, 18, 20))


def only_region(label, prediction, **options):
    (region,) = compare(label, prediction, spacing=SPACING, classes=CLASSES, **options).regions
    return region


def test_the_surface_is_made_of_faces():
    mask = make_box((2, 2, 2), (4, 5, 6)).astype(bool)
    z, y, x = 2 * 3.0, 3 * 1.5, 4 * 1.0
    assert surface_mm2(mask, SPACING) == pytest.approx(2 * (z * y + z * x + y * x))


def test_parallel_boundaries_are_as_far_apart_as_they_are():
    one, other = (make_box((2, 4, 4), (10, 20, stop)).astype(bool) for stop in (20, 22))
    faces = 8 * 3.0 * 16 * 1.5
    assert distance_mm(one, other, SPACING) == pytest.approx(
        2 * faces / ((surface_mm2(one, SPACING) + surface_mm2(other, SPACING)) / 2)
    )
    slab, thicker = (make_box((0, 0, 0), (12, 24, stop)).astype(bool) for stop in (10, 12))
    assert distance_mm(slab, thicker, SPACING) == pytest.approx(2.0)


def test_a_smaller_label_has_a_positive_offset():
    slab, thicker = (make_box((0, 0, 0), (12, 24, stop)).astype(bool) for stop in (10, 12))
    assert offset_mm(slab, thicker, SPACING) == pytest.approx(2.0)
    assert offset_mm(thicker, slab, SPACING) == pytest.approx(-2.0)


def test_what_agrees_has_no_region():
    found = compare(ORGAN, ORGAN.copy(), spacing=SPACING, classes=CLASSES)
    assert found.figures == {"organ": Figures(0.0, 0.0)} and found.regions == []


def test_nothing_at_all_is_no_disagreement():
    found = compare(np.zeros((4, 5, 6), int), np.zeros((4, 5, 6), int), spacing=SPACING, classes=CLASSES)
    assert found.figures == {} and found.regions == []


@pytest.mark.parametrize(("swap", "kind"), [(False, "missing"), (True, "extra")])
def test_a_structure_that_only_one_has_is_found(swap, kind):
    lonely = ORGAN + make_box((2, 20, 24), (5, 23, 27))
    label, prediction = (lonely, ORGAN) if swap else (ORGAN, lonely)
    region = only_region(label, prediction)
    assert (region.kind, region.class_name, region.centre) == (kind, "organ", (3, 21, 25))
    assert region.volume_mm3 == pytest.approx(27 * 4.5)


def test_a_class_that_is_missing_as_a_whole_is_found():
    region = only_region(np.zeros_like(ORGAN), ORGAN)
    assert region.kind == "missing" and region.description == "looks like organ, not labelled"


def test_swapped_labels_are_told_once_per_class():
    label = ORGAN + make_box((2, 20, 24), (9, 23, 29), label=2)
    prediction = np.where(label == 1, 2, np.where(label == 2, 1, 0))
    regions = compare(label, prediction, spacing=SPACING, classes=CLASSES).regions
    assert [(one.kind, one.description) for one in regions] == [
        ("swapped", "labelled organ, looks like lesion"),
        ("swapped", "labelled lesion, looks like organ"),
    ]


def test_a_shift_is_told_in_millimetres():
    region = only_region(make_box((3, 9, 6), (9, 21, 20)), ORGAN)
    assert region.kind == "shifted" and "moved by (+0.0, -4.5, +0.0) mm" in region.description


@pytest.mark.parametrize(
    ("label", "words"), [(make_box((4, 7, 7), (8, 17, 19)), "small"), (make_box((2, 5, 5), (10, 19, 21)), "large")]
)
def test_a_boundary_is_too_small_or_too_large(label, words):
    region = only_region(label, ORGAN)
    assert region.kind == "boundary" and region.description.endswith(f"mm too {words}")


def test_voxels_to_be_ignored_do_not_count():
    label = np.where(make_box((0, 0, 0), (12, 24, 12)) > 0, 3, ORGAN)
    assert compare(label, ORGAN, spacing=SPACING, classes=CLASSES, ignore_label=3).regions == []


def test_regions_of_several_labels_are_classes():
    classes = {"whole": (1, 2), "core": (2,)}
    label = ORGAN.copy()
    label[5:7, 10:14, 10:16] = 2
    found = compare(label, ORGAN, spacing=SPACING, classes=classes)
    assert found.figures["whole"].distance_mm == 0 and [one.kind for one in found.regions] == ["extra"]


def test_pictures_of_one_slice_are_compared_too():
    label, prediction = ORGAN[4:5], np.zeros_like(ORGAN[4:5])
    region = compare(label, prediction, spacing=(999.0, 1.0, 1.0), classes=CLASSES).regions[0]
    assert region.kind == "extra" and region.distance_mm == pytest.approx(2 * 12 * 14 / (2 * (12 + 14)))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(12, 24, 30\), the prediction \(12, 24, 29\)"):
        compare(ORGAN, ORGAN[..., 1:], spacing=SPACING, classes=CLASSES)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dims=st.sampled_from([(1, 9, 11), (5, 6, 7)]))
def test_any_two_maps_can_be_compared(seed, dims):
    rng = np.random.default_rng(seed)
    label, prediction = (rng.choice(4, dims, p=rng.dirichlet([1, 1, 1, 1])) for _ in range(2))
    found = compare(label, prediction, spacing=SPACING, classes=CLASSES, ignore_label=3)
    for region in found.regions:
        assert np.isfinite(region.distance_mm) and region.distance_mm > 0 and region.volume_mm3 > 0
        assert all(0 <= place < side for place, side in zip(region.centre, dims))
    other = compare(prediction, label, spacing=SPACING, classes=CLASSES)
    one = compare(label, prediction, spacing=SPACING, classes=CLASSES)
    for name, figures in one.figures.items():
        swapped = other.figures[name]
        assert figures.distance_mm == pytest.approx(swapped.distance_mm)
        assert figures.offset_mm == pytest.approx(-swapped.offset_mm) and abs(figures.offset_mm) <= figures.distance_mm
