import pytest

from nnunetv2.training.batch_shares import oversampling_of_rank, split_batch_size


@pytest.mark.parametrize(
    ("batch", "world", "expected"),
    [
        (2, 2, [(1, 0.0), (1, 1.0)]),
        (4, 2, [(2, 0.0), (2, 0.5)]),
        (3, 2, [(2, 0.0), (1, 1.0)]),
        (8, 4, [(2, 0.0), (2, 0.0), (2, 0.5), (2, 1.0)]),
        (12, 5, [(3, 0.0), (3, 0.0), (2, 0.0), (2, 1.0), (2, 1.0)]),
    ],
)
def test_batches_are_shared_as_in_the_reference(batch, world, expected):
    sizes = split_batch_size(batch, world)
    assert [(sizes[rank], oversampling_of_rank(batch, world, rank, 0.33)) for rank in range(world)] == expected


def test_more_processes_than_samples_are_refused():
    with pytest.raises(ValueError, match="batch of 2 cannot be shared among 3"):
        split_batch_size(2, 3)
