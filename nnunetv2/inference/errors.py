"""Name the faults of a network's answers."""


class NonFiniteLogitsError(RuntimeError):
    """The network answered with NaN, infinity, or more than float16 holds."""

    def __init__(self) -> None:
        super().__init__(
            "the network's logits are not finite, or beyond the range of float16 (65504). Check the image for NaN and "
            "extreme values, and the checkpoint for a training that diverged"
        )
