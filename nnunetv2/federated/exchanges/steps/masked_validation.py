"""Collect the masked counts of a validation, confirm the survivors, pool the sum.

Unmasking itself is the validation's own exchange (`validation.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunetv2.federated.aggregation import pooled_validation
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.secure_sums import LOSS, SecureSum, count_groups
from nnunetv2.federated.exchanges.steps.base import State
from nnunetv2.federated.exchanges.steps.secure_sum import ConfirmationStep, Opened, UploadStep
from nnunetv2.federated.privacy.secure_aggregation.fixed_point import decode_figure
from nnunetv2.federated.protocol.keys import RoundKey, ValidationKey, ValidationSurvivorsKey, ValidationUploadKey
from nnunetv2.federated.protocol.messages import PooledValidation, Validation
from nnunetv2.federated.protocol.secure_messages import Confirmed, Survivors

LARGEST_COUNT = 2**53
"""Voxels that a float64 holds exactly: sums that would be more come of counts that cannot be."""


class ValidationUploadStep(UploadStep[ValidationUploadKey]):
    """The sites of a round send masked counts of voxels; nobody waits for it."""

    key = ValidationUploadKey
    results = (Survivors, PooledValidation)
    policy = Policy(by_quorum=True, first_stays=True, closes_first=True)

    def used_by(self, key: ValidationUploadKey) -> ValidationKey:
        """Return the validation."""
        return ValidationKey(key.run, key.number)

    def prerequisite(self, key: ValidationUploadKey) -> RoundKey:
        """Return the round."""
        return RoundKey(key.run, key.number)

    def newest(self, key: ValidationUploadKey, state: State) -> Any:
        """Return the validation, for sites that come when it is over."""
        return self.used_by(key) if state.is_closed(self.used_by(key)) else key

    def sum_of(self, key: ValidationUploadKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the validation."""
        return reader.validation_sum(ValidationKey(key.run, key.number))

    def cohort(self, key: ValidationUploadKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other: those whose updates are in the round."""
        return state.contributors(RoundKey(key.run, key.number))

    def is_overtaken(self, key: ValidationUploadKey, state: State) -> bool:
        """Tell whether the next round is closed."""
        return state.is_closed(RoundKey(key.run, key.number + 1))

    def describe(self, key: ValidationUploadKey) -> str:
        """Return run and number."""
        return f"run {key.run}, masked counts of validation {key.number}"


class ValidationSurvivorsStep(ConfirmationStep[ValidationSurvivorsKey]):
    """The sites of a validation sign whose masked counts are there."""

    key = ValidationSurvivorsKey
    results = (Confirmed,)
    policy = Policy(first_stays=True, closes_first=True)

    def upload_key(self, key: ValidationSurvivorsKey) -> ValidationUploadKey:
        """Return the exchange of the masked counts."""
        return ValidationUploadKey(key.run, key.number)

    def sum_of(self, key: ValidationSurvivorsKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the validation."""
        return reader.validation_sum(ValidationKey(key.run, key.number))

    def cohort(self, key: ValidationSurvivorsKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        return state.contributors(RoundKey(key.run, key.number))

    def describe(self, key: ValidationSurvivorsKey) -> str:
        """Return run and number."""
        return f"run {key.run}, survivors of validation {key.number}"


def pool_opened(key: ValidationKey, opened: Opened, reader: DocumentReader) -> PooledValidation:
    """Return the pooled validation of a round, equal to that of counts in clear."""
    match = reader.agreement(key.run).match
    num_classes = reader.num_classes(key.run)
    counted = np.zeros((3, num_classes))  # of classes whose counts stay sealed, nothing is known
    for group in count_groups(match, opened.found.cohort.sites, num_classes, least=opened.found.least):
        counts = opened.small(group.name)
        if counts is None and match.annotated:
            continue
        if counts is None or max(counts, default=0) > LARGEST_COUNT:
            raise RefusedError(f"{key}: a site has counted more voxels than there are", code="do_not_match")
        counted[:, list(group.classes)] = np.reshape(counts, (3, -1))
    tp, fp, fn = (tuple(one.tolist()) for one in counted)
    loss = opened.small(LOSS)
    mean_loss = None if loss is None else decode_figure(loss[0], opened.total_weight(LOSS))
    pooled = pooled_validation.pool(
        key.number, {"all": Validation(tp=tp, fp=fp, fn=fn, loss=mean_loss)}, before=reader.last_validation(key.run)
    )
    return pooled.model_copy(update={"dice_of_site": {}, "loss_of_site": {}})


STEPS = (ValidationUploadStep(), ValidationSurvivorsStep())
