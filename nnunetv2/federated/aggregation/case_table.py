"""Add up the geometry of cases without telling whose they are.

A case is a record of eleven 32-bit words: spacing, shape, and the share of voxels that cropping leaves. Each record is
added, with its count and its hash, to three cells of a table that its hash chooses: an invertible Bloom lookup table.
Tables of several sites add up, word by word. In the sum, a cell with copies of a single record gives that record away;
it is taken out of its other two cells, which uncovers further ones, until the table is empty.

    cell    count | hash, 2 words | spacing, 6 words | shape, 3 words | relative size, 2 words      14 x uint64

Of n cases, 2n + 64 cells nearly always suffice. If not, the sites send tables twice as large, which show nothing more.

M. T. Goodrich and M. Mitzenmacher, "Invertible Bloom lookup tables", Allerton 2011.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nnunetv2.federated.errors import StatisticsError

LANES = 14
"""Words of a cell."""
MAX_DOUBLINGS = 6
"""How often a table is made larger. The first one of a hundred cases is too small once in some hundred times."""
_HASHES = 3
_RECORD = struct.Struct("<3d3Id")
_WORDS = np.dtype("<u4")
_IN_CELL = slice(3, LANES)


class Case(NamedTuple):
    """The geometry of one case, which sorts by spacing, then shape."""

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    relative_size: float
    """Voxels after cropping divided by those before."""


class TableTooSmallError(StatisticsError):
    """A table holds more cases than can be told apart."""


def num_cells(num_cases: int, doublings: int) -> int:
    """Return the number of cells of a table, a multiple of three."""
    return _HASHES * math.ceil((2 * num_cases + 64) / _HASHES) << doublings


def fill_table(cases: Iterable[Case], num_all_cases: int, doublings: int = 0) -> np.ndarray:
    """Return a site's table.

    Args:
        num_all_cases: The cases of all sites.
        doublings: How often the table was too small.

    Returns:
        uint64 (cells, 14).

    Raises:
        StatisticsError: A shape does not fit into 32 bits.
    """
    table = np.zeros((num_cells(num_all_cases, doublings), LANES), np.uint64)
    for case in cases:
        cell, places = _cell_and_places(_pack(case), len(table))
        table[places] += cell
    return table


def read_table(table: np.ndarray, num_cases: int) -> list[Case]:
    """Return the cases in a sum of tables, sorted, repetitions included.

    Args:
        table: uint64 (cells, 14), the sum mod 2^64.
        num_cases: The number of cases that it is to hold.

    Raises:
        TableTooSmallError: The cases cannot be told apart, or the sum is of something else.
        StatisticsError: Its records are no cases, or not `num_cases` of them.
    """
    left, cases = table.copy(), list[Case]()
    to_look_at = set(map(int, np.flatnonzero(left[:, 0])))
    while to_look_at:
        number = to_look_at.pop()
        count = int(left[number, 0])
        record = _single_record(left[number], count)
        if record is None:
            continue
        cell, places = _cell_and_places(record, len(left))
        if number not in places or not np.array_equal(cell * np.uint64(count), left[number]):
            continue
        if len(cases) + count > num_cases:
            raise StatisticsError(f"the sites' tables hold more than the {num_cases} cases of their census")
        cases += [_unpack(record)] * count
        left[places] -= cell * np.uint64(count)
        to_look_at.update(place for place in places if left[place, 0])
    if left.any():
        raise TableTooSmallError("the table of the sites' cases is too small to tell them apart")
    if len(cases) != num_cases:
        raise StatisticsError(f"the sites' tables hold {len(cases)} cases, their census {num_cases}")
    return sorted(cases)


def _single_record(cell: np.ndarray, count: int) -> bytes | None:
    """Return the record that a cell holds so many copies of; None if that cannot be."""
    if count == 0:
        return None
    words, rest = np.divmod(cell[_IN_CELL], np.uint64(count))
    if rest.any() or (words >> np.uint64(32)).any():
        return None
    return words.astype(_WORDS).tobytes()


def _cell_and_places(record: bytes, num_of_cells: int) -> tuple[np.ndarray, list[int]]:
    """Return the cell of a record, and its places, one per third."""
    digest = hashlib.sha256(record).digest()
    third = num_of_cells // _HASHES
    places = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") % third + i * third for i in range(_HASHES)]
    words = np.frombuffer(digest[24:] + record, _WORDS).astype(np.uint64)
    return np.concatenate([np.ones(1, np.uint64), words]), places


def _pack(case: Case) -> bytes:
    try:
        return _RECORD.pack(*case.spacing, *case.shape, case.relative_size)
    except struct.error as error:
        raise StatisticsError(f"a shape of {case.shape} voxels does not fit into a table of cases") from error


def _unpack(record: bytes) -> Case:
    numbers = _RECORD.unpack(record)
    case = Case(numbers[:3], numbers[3:6], numbers[6])
    lengths = (*case.spacing, case.relative_size)
    if not all(math.isfinite(length) and length > 0 for length in lengths) or min(case.shape) < 1:
        raise StatisticsError("the sites' tables hold a case with an impossible spacing or shape")
    return case
