"""Names by which weights are carried over; whole networks are in `tests/run/test_fine_tuning.py`."""

from __future__ import annotations

import pytest

from nnunetv2.models.weight_transfer import name_channels_and_classes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"background": 0, "b": 2, "a": 1, "ignore": 3}, ("background", "a", "b")),
        ({"background": 0, "whole": [1, 2], "core": 2}, ("whole", "core")),
        ({"background": 0, "air": 0, "whole": [1, 2], "core": 2}, ("whole", "core")),
        ({"background": 0, "only": [1]}, ("background", "only")),
    ],
)
def test_classes_are_named_in_the_order_of_the_outputs(labels, classes):
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "regions_class_order": [1, 2]}
    assert name_channels_and_classes(description, is_cascaded=False).classes == classes
