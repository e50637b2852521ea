"""The seam between weights and the form in which they travel: one codec per form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from nnunetv2.federated.aggregation.weighted_mean import Aggregated
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.messages import Aggregate, Update


class UpdateCodec(Protocol):
    """The form in which the weights of a run's rounds travel, up and down.

    A site has one of its own for as long as it trains, since it may keep what was not sent yet. The coordinator's keep
    nothing.
    """

    is_verbatim: bool
    """Whether aggregates travel as they are kept."""
    is_relative: bool
    """Whether what travels in a round is a change of the average before, which a site can also download whole."""

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
        """Note that the weights that were encoded last have counted."""
        ...

    def receive(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights to go on from, of tensors that came."""
        ...

    def rests(self) -> dict[str, np.ndarray]:
        """Return what the next update has to bring, by tensor.

        It is for a checkpoint, and empty where it need not be kept.
        """
        ...

    def take_over(self, rests: Mapping[str, np.ndarray]) -> None:
        """Go on with the rests of a checkpoint."""
        ...

    def forget_rests(self) -> None:
        """Bring nothing with the next update that rounding took from an earlier one."""
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
        """Write these tensors of an aggregate as they travel, and return the SHA-256.

        Args:
            whole: For a site that has not got the average before; of a codec that is relative.
        """
        ...
