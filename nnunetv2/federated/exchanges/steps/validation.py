"""Add up the sites' validations of a round's aggregate.

Nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping

from nnunetv2.federated.aggregation import pooled_validation
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.exchanges import plausibility
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Exchange, Policy
from nnunetv2.federated.exchanges.secure_sums import SecureSum
from nnunetv2.federated.exchanges.steps import masked_validation
from nnunetv2.federated.exchanges.steps.base import Computed, State, Step, messages_of
from nnunetv2.federated.exchanges.steps.secure_sum import Opened, UnmaskingStep, is_masked
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, write_document
from nnunetv2.federated.protocol.keys import RoundKey, ValidationKey, ValidationSurvivorsKey, ValidationUploadKey
from nnunetv2.federated.protocol.messages import PooledValidation, Validation


class ValidationStep(
    UnmaskingStep[ValidationKey, Validation, PooledValidation], Step[ValidationKey, Validation, PooledValidation]
):
    """The sites of a round send the voxels that they have counted.

    It is closed with fewer sites than the federation asks for, and then without a result; see `pooled_validation`.
    Where updates are masked, so are the counts (`masked_validation.py`); the sites send the shares that unmask them.
    """

    key = ValidationKey
    contribution, results = Validation, (PooledValidation,)
    policy = Policy(by_quorum=True, first_stays=True, closes_first=True)
    contribution_note = (
        ": scores of the average of round n; nobody waits for it. With `--secure`: `unmasking_shares`; `shares` U8"
    )

    def prerequisite(self, key: ValidationKey) -> RoundKey:
        """Return the round."""
        return RoundKey(key.run, key.number)

    def expected(self, key: ValidationKey, state: State) -> frozenset[str]:
        """Return the contributors of the round; those whose masked counts are there."""
        if is_masked(state):
            return super().expected(key, state)
        return frozenset(state.settings.sites) & state.contributors(RoundKey(key.run, key.number))

    def upload_key(self, key: ValidationKey) -> ValidationUploadKey:
        """Return the exchange of the masked counts."""
        return ValidationUploadKey(key.run, key.number)

    def survivors_key(self, key: ValidationKey) -> ValidationSurvivorsKey:
        """Return the exchange of the confirmations."""
        return ValidationSurvivorsKey(key.run, key.number)

    def sum_of(self, key: ValidationKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the validation."""
        return reader.validation_sum(key)

    def cohort(self, key: ValidationKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        return state.contributors(RoundKey(key.run, key.number))

    def combine_opened(
        self, exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader
    ) -> Computed:
        """Compute the pooled validation of counts whose sum could be unmasked."""
        key = exchange.key
        assert isinstance(key, ValidationKey)
        return _written(key, masked_validation.pool_opened(key, opened, reader), reader)

    def is_overtaken(self, key: ValidationKey, state: State) -> bool:
        """Tell whether the next round is closed."""
        return state.is_closed(RoundKey(key.run, key.number + 1))

    def check(
        self,
        key: ValidationKey,
        site: str,
        document: Document[Validation],
        reader: DocumentReader,
        settings: FederationSettings,
    ) -> None:
        """Raise StatisticsError if more voxels were counted than the site can have validated."""
        registration, found = reader.registration(key.run, site), document.message
        largest = plausibility.largest_validation(
            registration.plans, registration.configuration, settings.num_val_iterations_per_epoch
        )
        counted = max(sum(voxels) for voxels in zip(found.tp, found.fp, found.fn, strict=True))
        if counted > largest:
            raise StatisticsError("more voxels were validated than so many batches of such patches have")

    def describe(self, key: ValidationKey) -> str:
        """Return run and number."""
        return f"run {key.run}, validation {key.number}"

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[Validation]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Write the pooled validation, and record the results of single sites."""
        key = exchange.key
        assert isinstance(key, ValidationKey)
        pooled = pooled_validation.pool(
            key.number,
            messages_of(documents),
            before=reader.last_validation(key.run),
            min_sites=settings.min_sites,
            annotated=reader.agreement(key.run).match.annotated,
        )
        return _written(key, pooled, reader)


def _written(key: ValidationKey, pooled: PooledValidation, reader: DocumentReader) -> Computed:
    """Write the sites' part of a pooled validation, and record all."""
    for_sites = pooled.model_copy(update={"dice_of_site": {}, "loss_of_site": {}})
    digest = write_document(reader.result_path(key), for_sites, {}, [])
    return Computed(digest, pooled.model_dump(mode="json"))


STEPS = (ValidationStep(),)
