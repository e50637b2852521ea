"""Cases in memory, in place of preprocessed files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cases_in_memory import CasesInMemory, make_case


@pytest.fixture
def make_dataset():
    """Build a dataset of cases in memory."""

    def build(number=2, **options) -> CasesInMemory:
        return CasesInMemory({f"case_{i}": make_case(seed=i, **options) for i in range(number)})

    return build


@pytest.fixture
def make_labels():
    """Build what a loader asks of a label manager."""

    def build(has_ignore=False) -> SimpleNamespace:
        return SimpleNamespace(all_labels=[np.int64(label) for label in range(3)], has_ignore_label=has_ignore)

    return build
