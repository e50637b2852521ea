"""The kinds of classes that files name."""

from __future__ import annotations

import pytest

from nnunetv2.utilities.plug_in_kinds import PLANNER, PREPROCESSOR, TRAINER


@pytest.mark.parametrize("kind", [PLANNER, PREPROCESSOR, TRAINER], ids=lambda kind: kind.key)
def test_the_base_class_of_a_kind_is_in_its_package(kind):
    base = kind.base_class()
    assert base.__name__ == kind.base_name and base.__module__.startswith(f"nnunetv2.{kind.package}.")
