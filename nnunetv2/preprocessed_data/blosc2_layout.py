"""Choose how Blosc2 cuts a stored image into chunks and blocks.

So that reading one patch reads little else.

A block is decompressed at once and should fit a CPU's L2 cache; a chunk, a stack of blocks, is located in the file as
a unit and should fit the L3 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, prod
from typing import TYPE_CHECKING

from nnunetv2.errors import InvalidInputError

if TYPE_CHECKING:
    import blosc2
    import numpy as np

Shape4 = tuple[int, int, int, int]


def comp_blosc2_params(
    image_size: Sequence[int],
    patch_size: Sequence[int],
    bytes_per_pixel: int = 4,
    max_block_nbytes: int = 131072,
    max_chunk_nbytes: int = 6291456,
    max_chunk_to_patch_ratio_per_axis: float | None = 1.5,
    grow_singleton_patch_axes: bool = False,
) -> tuple[Shape4, Shape4]:
    """Return (block shape, chunk shape) for an image read in patches.

    The image is `(c, x, y, z)`.

    Both hold one channel. Blocks have sides of powers of two where the image allows; chunks are whole blocks, cut
    where the image or the wanted extent ends.

    Args:
        patch_size: Of 2 or 3 axes; 2 stand for slices `(y, z)`.
        max_chunk_to_patch_ratio_per_axis: A chunk's side is at most so many patch sides. None: no such limit.
        grow_singleton_patch_axes: Let chunks span several slices where the patch is one slice thick.
    """
    image_size, patch_size = [int(n) for n in image_size], [int(n) for n in patch_size]
    _check_sizes(image_size, patch_size, max_chunk_to_patch_ratio_per_axis)
    _check_limits(bytes_per_pixel, max_block_nbytes, max_chunk_nbytes)
    image = image_size[1:]
    patch = [1] * (3 - len(patch_size)) + patch_size
    ratio = max_chunk_to_patch_ratio_per_axis
    targets = [n if ratio is None else max(1, min(n, floor(ratio * p))) for n, p in zip(image, patch)]

    block = _choose_block(image, patch, targets, min(max_block_nbytes, max_chunk_nbytes) // bytes_per_pixel)
    may_grow = [grow_singleton_patch_axes or p > 1 for p in patch]
    if len(patch_size) == 2:
        may_grow[0] = False
    chunk = _grow_chunk(block, image, targets, may_grow, max_chunk_nbytes // bytes_per_pixel)
    return (1, *block), (1, *chunk)


def choose_filter(
    array: np.ndarray, blocks: Sequence[int], chunks: Sequence[int], codec: blosc2.Codec, clevel: int
) -> blosc2.Filter:
    """Return SHUFFLE if it makes the array's middle chunk smaller, else NOFILTER."""
    import blosc2
    import numpy as np

    extent = [min(n, c) for n, c in zip(array.shape, chunks)]
    starts = [(n - e) // 2 for n, e in zip(array.shape, extent)]
    sample = np.ascontiguousarray(array[tuple(slice(s, s + e) for s, e in zip(starts, extent))])
    blocks = tuple(min(b, e) for b, e in zip(blocks, extent))

    def compressed_size(filter_: blosc2.Filter) -> int:
        compressed = blosc2.asarray(
            sample, chunks=tuple(extent), blocks=blocks, cparams=compression(codec, clevel, filter_)
        )
        return compressed.schunk.cbytes

    shuffled, plain = compressed_size(blosc2.Filter.SHUFFLE), compressed_size(blosc2.Filter.NOFILTER)
    return blosc2.Filter.SHUFFLE if shuffled < plain else blosc2.Filter.NOFILTER


def compression(codec: blosc2.Codec, clevel: int, filter_: blosc2.Filter | Sequence[blosc2.Filter]) -> dict:
    """Return Blosc2's compression parameters with a filter.

    As the first of the pipeline, or as all of it.

    One thread: several write the blocks of a chunk in the order in which they happen to finish, so that no two runs
    give the same bytes. Other cases keep the other cores busy.
    """
    import blosc2

    pipeline = list(filter_) if isinstance(filter_, (list, tuple)) else [filter_]
    pipeline += [blosc2.Filter.NOFILTER] * (6 - len(pipeline))
    return {"codec": codec, "clevel": clevel, "filters": pipeline, "nthreads": 1}


def _check_sizes(image_size: Sequence[int], patch_size: Sequence[int], ratio: float | None) -> None:
    if len(image_size) != 4:
        raise InvalidInputError(f"expected an image size (c, x, y, z), got {tuple(image_size)}")
    if len(patch_size) not in (2, 3):
        raise InvalidInputError(f"expected a patch size of 2 or 3 axes, got {tuple(patch_size)}")
    if min(*image_size, *patch_size) < 1:
        raise InvalidInputError(f"image size {tuple(image_size)} and patch size {tuple(patch_size)} must be positive")
    if ratio is not None and ratio < 1:
        raise InvalidInputError(f"chunks must be allowed to reach the patch size, got a largest ratio of {ratio}")


def _check_limits(bytes_per_pixel: int, max_block_nbytes: int, max_chunk_nbytes: int) -> None:
    if min(bytes_per_pixel, max_block_nbytes, max_chunk_nbytes) < 1:
        raise InvalidInputError(
            f"sizes in bytes must be positive, got {bytes_per_pixel} per voxel, "
            f"{max_block_nbytes} per block and {max_chunk_nbytes} per chunk"
        )
    if bytes_per_pixel > min(max_block_nbytes, max_chunk_nbytes):
        raise InvalidInputError(
            f"a voxel of {bytes_per_pixel} bytes does not fit into a block of {max_block_nbytes} "
            f"or a chunk of {max_chunk_nbytes} bytes"
        )


def _choose_block(image: Sequence[int], patch: Sequence[int], targets: Sequence[int], max_voxels: int) -> list[int]:
    block = [min(_power_of_two_from(p), n) for p, n in zip(patch, image)]
    while prod(block) > max_voxels:
        shrinkable = [axis for axis in range(3) if block[axis] > 1]
        axis = max(shrinkable, key=lambda a: (block[a] / targets[a], a))
        block[axis] = _power_of_two_below(block[axis])
    return block


def _grow_chunk(
    block: Sequence[int], image: Sequence[int], targets: Sequence[int], may_grow: Sequence[bool], max_voxels: int
) -> list[int]:
    """Add blocks to the axis that is furthest from its target, as long as the chunk fits."""
    chunk = list(block)
    while True:
        grown = {}
        for axis in range(3):
            side = min(chunk[axis] + block[axis], image[axis], targets[axis])
            fits = prod(chunk) // chunk[axis] * side <= max_voxels
            if may_grow[axis] and chunk[axis] < min(image[axis], targets[axis]) and fits:
                grown[axis] = side
        if not grown:
            return chunk
        axis = min(grown, key=lambda a: (chunk[a] / targets[a], -image[a], a))
        chunk[axis] = grown[axis]


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power_of_two_below(n: int) -> int:
    return 1 << ((n - 1).bit_length() - 1)
