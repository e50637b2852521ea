"""Tables of cases add up to the cases of all sites, in any split, equal cases included."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.federated.aggregation.case_table import (
    MAX_DOUBLINGS,
    Case,
    TableTooSmallError,
    fill_table,
    num_cells,
    read_table,
)
from nnunetv2.federated.aggregation.fingerprint_statistics import listed_geometry, pool_fingerprint
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.messages import CoarseSummary

LENGTHS = st.floats(1e-5, 1e5)
EDGES = st.integers(1, 2**31)
CASES = st.builds(
    Case, st.tuples(LENGTHS, LENGTHS, LENGTHS), st.tuples(EDGES, EDGES, EDGES), st.floats(1e-6, 1, exclude_min=True)
)
SITES = st.lists(st.lists(st.integers(0, 11), max_size=12), min_size=1, max_size=5).filter(any)


def summed(sites, doublings=0):
    number = sum(map(len, sites))
    return sum((fill_table(cases, number, doublings) for cases in sites[1:]), fill_table(sites[0], number, doublings))


def read_growing(sites):
    """Read the sum of tables as a federation does: with larger ones as long as they are too small."""
    for doublings in range(MAX_DOUBLINGS + 1):
        try:
            return read_table(summed(sites, doublings), sum(map(len, sites)))
        except TableTooSmallError:
            continue
    raise AssertionError("no table was large enough")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(kinds=st.lists(CASES, min_size=12, max_size=12), dealt=SITES)
def test_the_sum_of_tables_is_the_multiset_of_all_cases(kinds, dealt):
    sites = [[kinds[number] for number in site] for site in dealt]
    assert read_growing(sites) == sorted(case for site in sites for case in site)


@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(CASES, min_size=12, max_size=12), dealt=SITES)
def test_the_fingerprint_has_the_geometry_of_today_to_the_bit(kinds, dealt):
    sites = [[kinds[number] for number in site] for site in dealt if site]
    summaries = [
        CoarseSummary(
            spacings=[case.spacing for case in sorted(site)],
            shapes=[case.shape for case in sorted(site)],
            relative_sizes=sorted(case.relative_size for case in site),
            moments=({"count": 0, "mean": 0.0, "m2": 0.0},),
            promotes_to_float64=True,
        )
        for site in sites
    ]
    from nnunetv2.federated.aggregation import fingerprint_statistics as statistics

    values = np.float32([1, 2])
    coarse = statistics.coarse_histogram(values)
    fine = statistics.fine_histogram(values, statistics.wanted_bins(coarse))
    summaries[0] = summaries[0].model_copy(update={"moments": (statistics.Moments.of(values),)})
    today = pool_fingerprint(summaries, [coarse], [fine])
    del today["foreground_intensity_properties_per_channel"]
    cases = read_growing(sites)
    found = listed_geometry(*zip(*((case.spacing, case.shape) for case in cases)), [c.relative_size for c in cases])
    assert json.dumps(found) == json.dumps(today)


def test_masks_that_cancel_leave_the_sum_as_it_is():
    rng = np.random.default_rng(1)
    sites = [
        [Case((1.0, 0.5, 0.5 + number / 7), (30, 100 + number, 90), 0.5) for number in range(begin, begin + 8)]
        for begin in (0, 4, 8)
    ]
    tables = [fill_table(cases, 24) for cases in sites]
    masks = [rng.integers(0, 2**64, tables[0].shape, np.uint64) for _ in tables[1:]]
    masked = sum((t + m for t, m in zip(tables[1:], masks)), tables[0] - sum(masks[1:], masks[0]))
    assert read_table(masked, 24) == sorted(case for cases in sites for case in cases)


def test_a_hundred_equal_cases_and_one_other_are_found():
    usual, rare = Case((3.0, 0.7, 0.7), (40, 512, 512), 1.0), Case((5.0, 0.7, 0.7), (24, 512, 512), 1.0)
    assert read_growing([[usual] * 60, [usual] * 40 + [rare]]) == [usual] * 100 + [rare]


def test_thousands_of_distinct_cases_are_told_apart():
    cases = [Case((0.5, 0.5, float(number)), (number, 7, 9), 0.5) for number in range(1, 3001)]
    assert read_table(summed([cases[:1000], cases[1000:]]), 3000) == cases


def test_a_table_that_is_too_small_says_so_and_a_larger_one_serves():
    # Found by trial: two cases whose three cells are the same in the smallest table.
    cases = colliding_cases()
    with pytest.raises(TableTooSmallError, match="too small"):
        read_table(summed([cases[:1], cases[1:]]), 2)
    assert read_table(summed([cases[:1], cases[1:]], doublings=1), 2) == sorted(cases)


def colliding_cases():
    seen = {}
    for number in range(1, 20_000):
        case = Case((1.0, 1.0, 1.0), (number, 1, 1), 1.0)
        cells = tuple(np.flatnonzero(fill_table([case], 2)[:, 0]))
        if cells in seen and not np.array_equal(*(fill_table([c], 2, 1)[:, 0] for c in (case, seen[cells]))):
            return [seen[cells], case]
        seen[cells] = case
    raise AssertionError("no two cases collide")


def test_cells_are_a_few_hundred_bytes_per_case():
    assert num_cells(300, 0) % 3 == num_cells(300, 4) % 3 == 0
    assert fill_table([], 300).nbytes / 300 < 270
    assert num_cells(300, 1) == 2 * num_cells(300, 0)


@pytest.mark.parametrize(
    "case",
    [
        Case((np.nan, 1.0, 1.0), (1, 1, 1), 1.0),
        Case((np.inf, 1.0, 1.0), (1, 1, 1), 1.0),
        Case((0.0, 1.0, 1.0), (1, 1, 1), 1.0),
        Case((1.0, 1.0, 1.0), (1, 0, 1), 1.0),
        Case((1.0, 1.0, 1.0), (1, 1, 1), -0.5),
    ],
)
def test_impossible_cases_are_refused(case):
    with pytest.raises(StatisticsError, match="impossible spacing or shape"):
        read_table(fill_table([case], 1), 1)


def test_shapes_beyond_32_bits_are_refused():
    with pytest.raises(StatisticsError, match="does not fit"):
        fill_table([Case((1.0, 1.0, 1.0), (2**32, 1, 1), 1.0)], 1)


def test_another_number_of_cases_than_the_census_is_refused():
    case = Case((1.0, 1.0, 1.0), (5, 6, 7), 1.0)
    for number in (1, 3):
        with pytest.raises(StatisticsError, match="census"):
            read_table(fill_table([case, case], 2), number)


def test_garbage_is_no_endless_search():
    garbage = np.random.default_rng(0).integers(0, 2**64, (num_cells(5, 0), 14), np.uint64)
    with pytest.raises(TableTooSmallError):
        read_table(garbage, 5)
