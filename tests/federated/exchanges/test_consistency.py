"""How the first difference between sites is named."""

import pytest

from nnunetv2.federated.exchanges.consistency import first_difference


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"A": 1, "B": 1}, None),
        ({"A": {"x": 1, "y": 2}, "B": {"y": 2, "x": 1}}, None),
        ({"A": 1, "B": 2}, "plans is 1 at A and 2 at B"),
        ({"A": 1, "B": 2, "C": 1, "D": 3}, "plans is 1 at A, C, 2 at B and 3 at D"),
        ({"A": {"x": {"y": 1}}, "B": {"x": {"y": None}}}, "plans.x.y is 1 at A and null at B"),
        ({"A": {}, "B": {"x": "t"}}, 'plans.x is absent at A and "t" at B'),
        ({"A": {"x": [1, [2, 3]]}, "B": {"x": [1, [2, 4]]}}, "plans.x[1][1] is 3 at A and 4 at B"),
        ({"A": [1], "B": [1, 2]}, "plans is [1] at A and [1,2] at B"),
        ({"A": {"x": 1}, "B": [1]}, 'plans is {"x":1} at A and [1] at B'),
        ({"A": True, "B": 1}, "plans is true at A and 1 at B"),
    ],
)
def test_the_first_difference_is_named(values, expected):
    assert first_difference(values, "plans") == expected


def test_long_values_are_shortened():
    assert len(first_difference({"A": "x" * 5000, "B": "y" * 5000}, "plans")) < 500
