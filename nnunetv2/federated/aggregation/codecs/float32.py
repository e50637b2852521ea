"""Let weights travel as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nnunetv2.federated.aggregation import weighted_mean
from nnunetv2.federated.protocol.document import Document, TensorSpec, write_subset
from nnunetv2.federated.protocol.messages import Aggregate, Update


class Float32:
    """The codec of single precision; see `UpdateCodec`."""

    is_verbatim = True
    is_relative = False

    def specs(self, registered: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the tensors."""
        return dict(registered)

    def encode(self, update: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights."""
        return dict(update)

    def settle(self) -> None:
        """Keep nothing."""

    def receive(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights."""
        return dict(tensors)

    def rests(self) -> dict[str, np.ndarray]:
        """Return nothing."""
        return {}

    def take_over(self, rests: Mapping[str, np.ndarray]) -> None:
        """Keep nothing."""

    def forget_rests(self) -> None:
        """Do nothing: there are none."""

    def combine(
        self,
        documents: Mapping[str, Document[Update]],
        weights: Mapping[str, float],
        *,
        out_path: Path,
        message: Aggregate,
        previous: Document[Aggregate],
        min_sites: int,
    ) -> weighted_mean.Aggregated:
        """Average updates and write the aggregate."""
        return weighted_mean.aggregate_documents(
            documents, weights, out_path=out_path, message=message, previous=previous, min_sites=min_sites
        )

    def handed_out(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def write_for_site(self, source: Document[Aggregate], path: Path, names: Iterable[str], *, whole: bool) -> str:
        """Write these tensors, byte for byte, and return the SHA-256."""
        return write_subset(source, path, names)
