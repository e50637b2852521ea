"""Define the interface of codecs: the forms in which weights travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from nnunetv2.federated.aggregation.weighted_mean import Aggregated
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.messages import Aggregate, Update


class UpdateCodec(Protocol):
    """The form in which a run's weights travel, up and down.

    A site has one of its own for as long as it trains, since it may keep rounding errors for the next update. The
    coordinator's codecs keep nothing.
    """

    is_verbatim: bool
    """Whether aggregates travel as they are kept."""
    is_relative: bool
    """Whether rounds exchange changes of the average before, which a site can also download whole."""

    def specs(self, registered: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return tensors as they travel in a round."""
        ...

    # ------------------------------------------------------------------------------------------------- at a site
    def encode(self, update: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return float32 weights as they are to be sent.

        The same weights give the same again until `settle`.

        Raises:
            PrecisionError: A value cannot travel; its tensor is named.
        """
        ...

    def settle(self) -> None:
        """Note that the last encoded weights have counted."""
        ...

    def receive(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights to go on from, given the received tensors."""
        ...

    def rests(self) -> dict[str, np.ndarray]:
        """Return the rounding errors due with the next update, by tensor.

        They are for a checkpoint; empty where they need not be kept.
        """
        ...

    def take_over(self, rests: Mapping[str, np.ndarray]) -> None:
        """Restore the rounding errors of a checkpoint."""
        ...

    def forget_rests(self) -> None:
        """Drop the rounding errors of earlier updates."""
        ...

    # ---------------------------------------------------------------------------------------- at the coordinator
    def combine(
        self,
        documents: Mapping[str, Document[Update]],
        weights: Mapping[str, float],
        *,
        out_path: Path,
        message: Aggregate,
        previous: Document[Aggregate],
        min_sites: int,
    ) -> Aggregated:
        """Average updates and write the aggregate; see `weighted_mean.aggregate_documents`."""
        ...

    def handed_out(self, values: np.ndarray) -> np.ndarray:
        """Return values of an aggregate as sites get them."""
        ...

    def write_for_site(self, source: Document[Aggregate], path: Path, names: Iterable[str], *, whole: bool) -> str:
        """Write tensors of an aggregate as they travel; return the SHA-256.

        Args:
            whole: For a site without the average before; only of relative codecs.
        """
        ...
