"""Share a batch and its foreground samples among processes."""

from __future__ import annotations


def split_batch_size(batch_size: int, world_size: int) -> list[int]:
    """Return the number of samples per process, as equal as possible.

    The first processes take one more.

    Raises:
        ValueError: There are more processes than samples.
    """
    if batch_size < world_size:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared among {world_size} GPUs: every GPU needs a sample "
            "(use fewer GPUs, or plans with a larger batch size)"
        )
    base, extra = divmod(batch_size, world_size)
    return [base + (rank < extra) for rank in range(world_size)]


def oversampling_of_rank(batch_size: int, world_size: int, rank: int, oversample_foreground_percent: float) -> float:
    """Return the fraction of a process's samples that must show foreground.

    In the whole batch these are the last `oversample_foreground_percent` of the samples.
    """
    sizes = split_batch_size(batch_size, world_size)
    first = sum(sizes[:rank])
    last = first + sizes[rank]
    random_part = 1 - oversample_foreground_percent
    if last / batch_size < random_part:
        return 0.0
    if first / batch_size > random_part:
        return 1.0
    return sum(i >= round(batch_size * random_part) for i in range(first, last)) / sizes[rank]


def loss_weight_of_rank(batch_size: int, world_size: int, rank: int) -> float:
    """Return the factor of a process's loss.

    With it, the mean over processes is that over all samples.

    It is 1 if the processes have equally many samples. The Dice of a whole batch is the same number in all processes,
    and the weights sum to the number of processes, so it stays the same.
    """
    return split_batch_size(batch_size, world_size)[rank] * world_size / batch_size
