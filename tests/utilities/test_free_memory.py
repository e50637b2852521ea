"""Tests of asking for free memory."""

from __future__ import annotations

import pytest

from nnunetv2.utilities import free_memory
from nnunetv2.utilities.free_memory import free_memory_bytes, total_memory_bytes


@pytest.fixture
def system(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    return tmp_path


def test_the_machine_says_what_is_available(system):
    assert free_memory_bytes(system, system) == 1000 * 1024


@pytest.mark.parametrize(
    ("names", "cache"), [(free_memory._CGROUP_2, "inactive_file"), (free_memory._CGROUP_1, "total_inactive_file")]
)
def test_a_containers_limit_counts_if_it_leaves_less(system, names, cache):
    limit, usage = (system / name for name in names[:2])
    limit.parent.mkdir(exist_ok=True)
    limit.write_text("9000\n")
    usage.write_text("5000\n")
    (usage.parent / "memory.stat").write_text(f"anon 4000\n{cache} 300\n")
    assert free_memory_bytes(system, system) == 9000 - 5000 + 300


def test_no_limit_is_no_limit(system):
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("5000\n")
    assert free_memory_bytes(system, system) == 1000 * 1024


def test_this_machine_has_memory():
    assert free_memory_bytes() > 2**20


def test_all_memory_is_that_of_the_machine_or_of_a_container(system):
    assert total_memory_bytes(system, system) == 2000 * 1024
    (system / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\nSwapTotal: 500 kB\n")
    assert total_memory_bytes(system, system) == 2500 * 1024
    (system / "memory.max").write_text("max\n")
    assert total_memory_bytes(system, system) == 2500 * 1024
    (system / "memory.max").write_text("9000\n")
    assert total_memory_bytes(system, system) == 9000
