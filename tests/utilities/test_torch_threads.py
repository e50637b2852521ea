"""How many threads torch gets."""

from __future__ import annotations

import pytest
import torch

from nnunetv2.utilities.device import set_torch_threads, usable_cpu_count


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


ALL_CORES = usable_cpu_count()


@pytest.mark.parametrize(("wanted", "expected"), [("1", 1), ("3", 3), ("", ALL_CORES), ("0", ALL_CORES)])
def test_the_variable_of_openmp_decides_on_a_cpu(wanted, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    set_torch_threads("cpu")
    assert torch.get_num_threads() == expected
