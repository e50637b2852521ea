"""Plan from a pooled fingerprint of which the coordinator sees masked sums only.

    census                     number of cases, channels, labels, this site's key    -> number of all cases, all keys
    fingerprint/sums/<n>       a masked vector, for one sum after the other          -> at last, the pooled fingerprint
    plans/<plans>/sums/<n>     the same, of shapes at the target spacing             -> their median

The last ones only where geometry is told by order statistics (`--geometry quantiles`). A site that comes late masks
nothing: it sends its census, and waits for the results of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.experiment_planning.experiment_planners.case_geometry import resampled_shapes
from nnunetv2.experiment_planning.planning import make_planner
from nnunetv2.experiment_planning.secure_fingerprint import FingerprintAnswers, extends
from nnunetv2.experiment_planning.site_cases import (
    compare_geometry,
    compare_geometry_with_medians,
    intensities_per_channel,
    sample_locally,
)
from nnunetv2.federated.aggregation import fingerprint_sums, geometry_quantiles
from nnunetv2.federated.errors import FederationError, RefusedError, StillOpenError, WireError
from nnunetv2.federated.exchanges.secure_fingerprint import SUM, plan_fingerprint_sum, plan_shape_sum
from nnunetv2.federated.privacy.own_networks import name_to_compare
from nnunetv2.federated.privacy.require_secure import required_k
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.secure_fingerprint_messages import DigitCounts, Geometry, NextSum, ResampledShape
from nnunetv2.federated.site import results
from nnunetv2.federated.site.identity import forget_run_keys, load_identity, run_key, secure_folder
from nnunetv2.federated.site.masking import Masking, SiteKeys
from nnunetv2.federated.site.outbox import Outbox
from nnunetv2.federated.site.roster import trusted_keys
from nnunetv2.preprocessed_data.fingerprint_files import FINGERPRINT_FILE, GEOMETRY_STATISTICS
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import JsonFileError, read_json
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
    from nnunetv2.federated.exchanges.secure_sums import SecureSum
    from nnunetv2.federated.protocol.api import FederationSettings, Secure
    from nnunetv2.federated.protocol.keys import ExchangeKey, Key, R
    from nnunetv2.federated.protocol.secure_messages import Confirmation, MaskedUpdate, UnmaskingShares
    from nnunetv2.federated.site.credential import SiteCredential
    from nnunetv2.federated.site.transport import Transport

POOLING = "fingerprint"
"""The name under which a site keeps the keys and promises of its masks."""
MOST_SUMS = 40
"""Of a fingerprint: looks into bins, and tables or digits."""


def check_extrema_stay(settings: FederationSettings, *, share_extrema: bool) -> None:
    """Raise RefusedError if extrema are to leave a site whose statistics are summed behind masks."""
    if settings.secure is not None and share_extrema:
        raise RefusedError(
            "this federation adds up masked statistics, and a smallest voxel is no sum: --share_extrema cannot be "
            "done, and nothing was sent",
            "Leave it out.",
            code="extrema_not_masked",
        )


class SecurePooling:
    """One site's way through the sums of a federation that masks its statistics.

    Args:
        transport: The way to the coordinator.
        secure: The federation's settings of its masks.
        credential: Of this site.
        credential_file: Where it is; the usual place if None.
        networks: Whether the sites plan the same network, or each its own.
    """

    def __init__(
        self,
        transport: Transport,
        secure: Secure,
        credential: SiteCredential,
        credential_file: Path | None,
        *,
        networks: messages.Networks = "equal",
    ) -> None:
        self._transport = transport
        self._secure = secure
        self._networks = networks
        self._credential = credential
        self._credential_file = credential_file
        self._private_key, self._signed = run_key(credential.federation, str(keys.CensusKey()), credential_file)
        self._outbox = Outbox(secure_folder(credential.federation, POOLING, credential_file))
        site_keys = SiteKeys(load_identity(credential_file), self._private_key.private_bytes_raw())
        self._masking = Masking(transport, site=credential.site, keys=site_keys, outbox=self._outbox)

    @property
    def geometry(self) -> Geometry:
        """The form in which spacings and shapes are told."""
        return self._secure.geometry

    def with_keys(self, census: messages.Census) -> messages.Census:
        """Return a census with this site's key."""
        return census.model_copy(update={"keys": self._signed})

    # ------------------------------------------------------------------------------------------------- fingerprint
    def take_part(self, extractor: Any, census: messages.Census, planner: Mapping[str, Any]) -> int:
        """Pool the fingerprint with all others, and write it beside the local one.

        Args:
            census: With this site's key.
            planner: Keywords of `plan_experiment_dataset`.

        Returns:
            The number of cases of all sites.

        Raises:
            RefusedError: The census was closed without this site (`closed_without`); or the datasets, keys or target
                spacings do not go together.
        """
        pooled_census = self._transport.exchange(keys.CensusKey(), census).message
        self._check_census(pooled_census, census)
        samples = sample_locally(extractor, pooled_census.num_cases)
        answers = self._answers(extractor, samples, pooled_census, census)
        pooled = self._pool(answers, pooled_census, len(census.channel_names))
        found = results.check_fingerprint(pooled, len(census.channel_names), geometry=self.geometry)
        spacings, shapes, _ = zip(*answers.cases, strict=True)
        if isinstance(found, results.Fingerprint):
            compare_geometry(spacings, shapes, pooled)
            save_json_atomically(pooled.fingerprint, Path(extractor.output_folder) / FINGERPRINT_FILE)
            # Those of a federation that tells order statistics are needed again, for other plans.
            forget_run_keys(self._credential.federation, POOLING, self._credential_file)
            return pooled.num_cases
        compare_geometry_with_medians(spacings, shapes, found.geometry_statistics)

        def add_shapes(plans: str, target: np.ndarray, number: int, asked: NextSum) -> NextSum | ResampledShape:
            question = asked.question
            assert isinstance(question, DigitCounts)
            upload = keys.ShapeSumUploadKey(plans, number)
            key = keys.ShapeSumKey(plans, number)
            return self._add(
                upload,
                keys.ShapeSumSurvivorsKey(plans, number),
                key,
                plan_shape_sum(key, asked, federation=self._credential.federation, census=pooled_census, target=target),
                lambda: fingerprint_sums.digits_vector(
                    geometry_quantiles.quantities_of_shapes(resampled_shapes(spacings, shapes, target)), question
                ),
                pooled_census,
            )

        self._write_with_shapes(extractor, pooled, planner, add_shapes)
        return pooled.num_cases

    def come_late(self, extractor: Any, census: messages.Census, planner: Mapping[str, Any]) -> int:
        """Wait for the fingerprint that others pool without this site; write it.

        Returns:
            The number of cases of the others.
        """
        late_census = self._transport.exchange(keys.LateCensusKey(self._credential.site), census).message
        show(
            f"The other sites had begun to pool their fingerprints before this one came: its own {census.num_cases} "
            f"cases are not part of the plans, which are made from {late_census.num_cases} cases of the others.",
            flush=True,
        )
        sample_locally(extractor, late_census.num_cases)
        pooled = self._wait_for_fingerprint()
        forget_run_keys(self._credential.federation, POOLING, self._credential_file)  # it masks nothing
        found = results.check_fingerprint(pooled, len(census.channel_names), geometry=self.geometry)
        if isinstance(found, results.Fingerprint):
            save_json_atomically(pooled.fingerprint, Path(extractor.output_folder) / FINGERPRINT_FILE)
        else:
            self._write_with_shapes(
                extractor,
                pooled,
                planner,
                lambda plans, target, number, asked: self._wait_for(
                    keys.ShapeSumUploadKey(plans, number),
                    keys.ShapeSumSurvivorsKey(plans, number),
                    keys.ShapeSumKey(plans, number),
                ),
            )
        return pooled.num_cases

    def _wait_for_fingerprint(self) -> messages.PooledFingerprint:
        for number in range(MOST_SUMS):
            message = self._wait_for(
                keys.FingerprintSumUploadKey(number),
                keys.FingerprintSumSurvivorsKey(number),
                keys.FingerprintSumKey(number),
            )
            if isinstance(message, messages.PooledFingerprint):
                return message
        raise too_many_sums()

    def _wait_for(self, upload_key: Key, survivors_key: Key, key: ExchangeKey[UnmaskingShares, R]) -> R:
        """Return the result of a sum of others.

        Stage by stage, as none can begin before the one before it is closed.
        """
        self._transport.result(upload_key)
        self._transport.result(survivors_key)
        return self._transport.result(key).message

    def _answers(
        self,
        extractor: Any,
        samples: Sequence[CaseSample],
        pooled_census: messages.PooledCensus,
        census: messages.Census,
    ) -> FingerprintAnswers:
        num_cases = pooled_census.num_cases
        return FingerprintAnswers(
            samples,
            intensities_per_channel(samples),
            num_cases=num_cases,
            others=extractor.num_samples_per_case(num_cases) * (num_cases - census.num_cases),
            geometry=self.geometry,
        )

    def _pool(
        self, answers: FingerprintAnswers, census: messages.PooledCensus, num_channels: int
    ) -> messages.PooledFingerprint:
        """Answer one question after the other, until the fingerprint is known."""
        for number in range(MOST_SUMS):
            key = keys.FingerprintSumKey(number)
            found = plan_fingerprint_sum(
                key, answers.asked, federation=self._credential.federation, census=census, num_channels=num_channels
            )
            message = self._add(
                keys.FingerprintSumUploadKey(number),
                keys.FingerprintSumSurvivorsKey(number),
                key,
                found,
                answers.vector,
                census,
            )
            if isinstance(message, messages.PooledFingerprint):
                return message
            answers.proceed(message)
        raise too_many_sums()

    def _check_census(self, pooled: messages.PooledCensus, own: messages.Census) -> None:
        """Raise an error unless enough sites whose identities this one accepts mask with each other."""
        if pooled.num_cases < own.num_cases:
            raise WireError(
                f"the coordinator counts {pooled.num_cases} cases of all sites; this site alone has {own.num_cases}"
            )
        least = max(self._secure.k, required_k(self._credential.secure) or 0)
        if len(pooled.keys) < least or self._credential.site not in pooled.keys:
            raise WireError(
                f"the coordinator names {len(pooled.keys)} sites that are to add up their statistics; it takes "
                f"{least}, this one among them: nothing was sent"
            )
        trusted = trusted_keys(
            pooled.keys, self._credential, gathering=str(keys.CensusKey()), credential_file=self._credential_file
        )
        show(f"Statistics of {len(pooled.keys)} sites are added up behind masks; {trusted}.", flush=True)

    # ------------------------------------------------------------------------------------------------------- sums
    def _add(
        self,
        upload_key: ExchangeKey[MaskedUpdate, Any],
        survivors_key: ExchangeKey[Confirmation, Any],
        key: ExchangeKey[UnmaskingShares, R],
        found: SecureSum,
        vector: Callable[[], np.ndarray],
        census: messages.PooledCensus,
    ) -> R:
        """Add this site's vector to a sum, unless done; return the result."""
        if self._outbox.is_closed(str(upload_key)):
            return self._transport.result(key).message
        if census.keys[self._credential.site].exchange_key != self._signed.exchange_key:
            return self._receive_only(key)

        def fill(words: np.ndarray) -> None:
            words[:] = vector()

        sent = self._masking.upload(upload_key, found, {SUM: fill}, 1)
        message = self._masking.unmask(upload_key, survivors_key, key, found, sent).message
        self._outbox.drop(str(upload_key))
        return message

    def _receive_only(self, key: ExchangeKey[UnmaskingShares, R]) -> R:
        """Return the result of a sum masked with an earlier key of this site."""
        try:
            return self._transport.result(key, wait_s=0).message
        except (StillOpenError, RefusedError) as error:
            if isinstance(error, RefusedError) and error.code != "too_early":
                raise
            folder = secure_folder(self._credential.federation, POOLING, self._credential_file)
            raise FederationError(
                f"{key}: this site's key is not the one that it gave to the others, so its masks would not cancel out. "
                f"Bring back what lay in {folder}, or ask the coordinating site for a new federation"
            ) from error

    # ------------------------------------------------------------------------------------------- resampled shapes
    def _write_with_shapes(
        self,
        extractor: Any,
        pooled: messages.PooledFingerprint,
        planner: Mapping[str, Any],
        add: Callable[[str, np.ndarray, int, NextSum], NextSum | ResampledShape],
    ) -> None:
        """Find the median shape at the target spacing of the plans, and write the fingerprint with it."""
        file = Path(extractor.output_folder) / FINGERPRINT_FILE
        fingerprint = with_shapes_of(file, dict(pooled.fingerprint))
        save_json_atomically(fingerprint, file)  # from which the planner finds the spacing
        the_planner = make_planner(extractor.dataset_name, **planner)
        target = np.asarray(the_planner.determine_fullres_target_spacing(), float)
        name = name_to_compare(the_planner.plans_identifier, self._networks)
        median = _find_shape(lambda number, asked: add(name, target, number, asked))
        save_json_atomically(geometry_quantiles.with_resampled_shape(fingerprint, target.tolist(), median), file)


def _find_shape(add: Callable[[int, NextSum], NextSum | ResampledShape]) -> tuple[float, ...]:
    """Return the median shape, from four sums."""
    asked = fingerprint_sums.FIRST_RESAMPLED
    for number in range(MOST_SUMS):
        message = add(number, asked)
        if isinstance(message, ResampledShape):
            return message.median
        before, question = asked.question, message.question
        if not (isinstance(before, DigitCounts) and isinstance(question, DigitCounts) and extends(question, before)):
            break
        asked = message
    raise too_many_sums()


def with_shapes_of(file: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return a pooled fingerprint with the resampled shapes that a file knows already.

    None of them, if that file is of other cases.
    """
    try:
        before = read_json(file).get(GEOMETRY_STATISTICS, {})
    except (OSError, JsonFileError):
        return fingerprint
    statistics = fingerprint[GEOMETRY_STATISTICS]
    known = {name: value for name, value in before.items() if name in statistics}
    if known != json.loads(json.dumps(statistics)) or "resampled_shapes" not in before:
        return fingerprint
    shapes = before["resampled_shapes"]
    return {**fingerprint, GEOMETRY_STATISTICS: {**statistics, "resampled_shapes": shapes}}


def too_many_sums() -> FederationError:
    """Return the error of a site that is asked for more than a fingerprint takes."""
    return FederationError(
        "the coordinator wants to add up more than a fingerprint takes: nothing more is sent. Ask the coordinating "
        "site which version it runs"
    )
