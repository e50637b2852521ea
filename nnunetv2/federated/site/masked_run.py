"""Take part in a training run whose updates are masked.

That is: keys, the sums of a round, figures, validations.

Knows weights as named arrays; how numbers are masked and unmasked is in `masking.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from nnunetv2.federated.aggregation import late_join
from nnunetv2.federated.aggregation.matching import check_names
from nnunetv2.federated.aggregation.weighted_mean import OUTLIER_FACTOR
from nnunetv2.federated.errors import FederationError, RefusedError, WireError
from nnunetv2.federated.exchanges.masked_codecs import MaskedCodec, masked_codec_of
from nnunetv2.federated.exchanges.secure_sums import (
    CHANGES,
    EARLIER,
    FIGURES,
    LOSS,
    TRAINING,
    VALIDATED,
    RoundPlan,
    SecureSum,
    count_groups,
    match_digest,
    num_classes_of,
    plan_round,
    plan_validation,
    sites_that_differ,
    training_digest,
)
from nnunetv2.federated.privacy.cryptography_library import require_cryptography
from nnunetv2.federated.privacy.own_networks import data_part_of_training
from nnunetv2.federated.privacy.plans_redaction import WITHHELD
from nnunetv2.federated.privacy.secure_aggregation.fixed_point import CHANGE_BITS, encode_figure
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import digest_of
from nnunetv2.federated.privacy.trust import trust_mode
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.strict_json import canonical_json
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.identity import forget_run_keys, has_run_key, load_identity, run_key, secure_folder
from nnunetv2.federated.site.masking import Fill, Masking, SiteKeys
from nnunetv2.federated.site.outbox import Outbox
from nnunetv2.federated.site.roster import trusted_keys
from nnunetv2.federated.site.transport import VALIDATION_PATIENCE_S, Transport

Weights = Mapping[str, np.ndarray]
"""Canonical name -> array."""
START_ANEW_VARIABLE = "nnUNet_fed_start_anew"
"""Names the run that begins anew, with which a person says that this is so."""
_BLOCK = 1 << 15
OPERATORS_AFFAIR = frozenset({"round_spent", "false_envelope"})
"""Refusals with which a training waits for the round's result: with a quorum the others go on, else the operator closes
the round without one."""
LARGEST_CHANGE = 7.0
"""Distances are cut to it: a site that moves farther is conspicuous anyway."""


class MaskedRun:
    """This site's part in one run whose updates are masked.

    Args:
        transport: The way to the coordinator.
        credential: Who this site is.
        settings: Those that the training obeys, and to which its masks are bound.
        run: Name of the run.
        report: Receives lines for the people at this site.
        credential_file: Beside which this site keeps its identity, keys and outbox. None: that of this machine.
    """

    def __init__(
        self,
        transport: Transport,
        credential: SiteCredential,
        settings: FederationSettings,
        *,
        run: str,
        report: Callable[[str], object],
        credential_file: Path | None = None,
    ) -> None:
        require_cryptography("a federation whose updates are masked")
        self.transport = transport
        self.site = credential.site
        self.run = run
        self._report = report
        self._credential = credential
        self._credential_file = credential_file
        assert settings.secure is not None, "updates are masked"
        self._least = settings.secure.k
        self._weighting, self._num_rounds = settings.weighting, settings.num_rounds
        self._settings = training_digest(settings)
        self._expects_equal = True
        """Whether the networks of all sites are to be the same."""
        self._planned = b""
        """Digest of the part of the plans that the pooled fingerprint decides; empty if this site has planned alone."""
        self._is_told_of_networks = False
        self._outbox = Outbox(secure_folder(credential.federation, f"runs/{run}", credential_file))
        self._registered: frozenset[str] = frozenset()
        self._trusted: Mapping[str, messages.SignedKey] = {}
        self._aggregates: list[tuple[messages.Aggregate, Weights]] = []
        """The last two that were downloaded, the newest one last."""
        self.is_over = False
        """Whether the last round of the run is known to be closed."""
        self._unfinished: list[tuple[int, SecureSum, frozenset[str]]] = []
        """Validations whose counts were sent, and not unmasked yet: round, sums, lanes that were sent."""

    # ---------------------------------------------------------------------------------------------- registration
    def sign_registration(
        self, registration: messages.Registration, key: keys.Key, *, is_known: bool
    ) -> messages.Registration:
        """Return a registration with the run key of this site.

        Args:
            key: The exchange that it is for.
            is_known: Whether the coordinator has a registration of this site.

        Raises:
            RefusedError: `run_began_anew`: the coordinator knows nothing of this site, which has masked for this run,
                and nobody here has said that this is right. `run_key_lost`: it does, and the key is no longer here.
        """
        self._gathering = str(key)
        if is_known and not has_run_key(self._credential.federation, self._gathering, self._credential_file):
            raise RefusedError(
                f"the key with which this site masks in run {self.run} is no longer here, and the others know no other "
                "one: nothing was sent",
                f"Bring back {secure_folder(self._credential.federation, self._gathering, self._credential_file)} from "
                "a backup. Else this run goes on without this site; it takes part in the next federation.",
                code="run_key_lost",
            )
        if not is_known and self._outbox.has_promises:
            self._begin_anew()
        _, signed = run_key(self._credential.federation, self._gathering, self._credential_file)
        return registration.model_copy(update={"keys": signed, "trust": trust_mode()})

    def _begin_anew(self) -> None:
        """Mask with another key from now on, if a person has said that the run begins anew."""
        if os.environ.get(START_ANEW_VARIABLE) != self.run:
            raise RefusedError(
                f"run {self.run} begins anew at the coordinator, and this site has sent masked updates of it before: "
                "two of one round could show their difference",
                "Ask the coordinating site whether it has reset the run. If so, start once with "
                f"{START_ANEW_VARIABLE}={self.run}",
                code="run_began_anew",
            )
        forget_run_keys(self._credential.federation, f"runs/{self.run}", self._credential_file)
        self._outbox.start_anew()
        self._report(f"Run {self.run} begins anew, as {START_ANEW_VARIABLE} says: this site masks with another key")

    def forget(self) -> None:
        """Forget the keys and masked documents of a run that is over."""
        self._outbox.drop_others(())
        forget_run_keys(self._credential.federation, f"runs/{self.run}", self._credential_file)

    def begin(self, match: messages.Match, registration: messages.Registration, registered: tuple[str, ...]) -> None:
        """Check the match of the run's sites, and take it over.

        Args:
            match: With the keys of all sites so far.
            registration: The registration of this site.
            registered: Sites that were there when the run was registered; others were admitted.

        Raises:
            RefusedError: A key is not that of its site; see `roster.trusted_keys`. `sum_too_small`: a tensor is shared
                by fewer sites than a sum is to have.
            MatchingError: A tensor goes by another one's name, so that its site would learn nothing, or next to it.
            WireError: This site is said to annotate other classes than it does, so that counts would be another one's.
        """
        names = match.received_by(self.site)
        check_names(names, registration.tensors, rule=match.rule)
        self._check_enough_share(match, names)
        data = registration.dataset_json
        annotated = None if data.annotated_labels is None else data.annotated_values
        if match.annotated.get(self.site) != annotated:
            raise WireError(
                f"the coordinator says that this site annotates {match.annotated.get(self.site)}, and it annotates "
                f"{annotated}: nothing was sent. Use matching versions; else show this to the coordinating site"
            )
        self.match = match
        self._registered = frozenset(registered)
        self._registration = registration
        planned_together, networks = WITHHELD not in registration.plans, self._credential.networks or "equal"
        if planned_together:
            part = data_part_of_training(registration.plans, registration.configuration, networks)
            self._planned = digest_of(canonical_json(part))
        self._expects_equal = planned_together and networks == "equal"
        self._codec: MaskedCodec = masked_codec_of(match.precision)
        self._weight = registration.num_training_cases if self._weighting == "cases" else 1
        entries = {entry.name: entry for entry in registration.tensors}
        self._specs = {name: TensorSpec(entries[local].dtype, entries[local].shape) for name, local in names.items()}
        private, _ = run_key(self._credential.federation, self._gathering, self._credential_file)
        secrets = SiteKeys(load_identity(self._credential_file), private.private_bytes_raw())
        self._masking = Masking(self.transport, site=self.site, keys=secrets, outbox=self._outbox)
        self._trust(match.keys)

    def _check_enough_share(self, match: messages.Match, names: Collection[str]) -> None:
        """Refuse tensors of so few sites that nobody could compare them."""
        few = sorted(name for name in names if len(match.shared[name]) < self._least)
        if few:
            raise RefusedError(
                f"the coordinator takes tensor {few[0]} for shared among {len(match.shared[few[0]])} sites "
                f"({len(few)} in all), and nothing is summed over fewer than {self._least}: nothing was sent",
                "Use matching versions; else show this to the coordinating site.",
                code="sum_too_small",
            )

    def _check_networks(self, cohort: Collection[str]) -> None:
        """Refuse a cohort whose networks differ, where they are to be the same; else say so.

        Raises:
            RefusedError: `networks_differ`: the sites have planned together for equal networks.
        """
        different = sites_that_differ(self.match, cohort)
        if not different:
            return
        found = f"the networks of the sites differ: {', '.join(different)} lack tensors that others have"
        if self._expects_equal:
            raise RefusedError(
                f"{found}, though all have planned together: a coordinator that lies could learn the sum of few sites. "
                "Nothing was sent",
                "Plan with --federated at all sites, so that their networks are the same. Where they are to differ, "
                "plan with --federated asym at all sites, or found the federation with --networks own.",
                code="networks_differ",
            )
        if not self._is_told_of_networks:
            self._report(f"Beware: {found}. A coordinator that lies could learn the sum of few sites")
            self._is_told_of_networks = True

    def _training(self, cohort: Collection[str]) -> bytes:
        """Return the digest of a cohort's training settings, plans and match."""
        return digest_of(self._settings, self._planned, match_digest(self.match, cohort))

    def _trust(self, signed: Mapping[str, messages.SignedKey]) -> None:
        """Accept the keys of the run's sites, or refuse them."""
        if signed == self._trusted:
            return
        gathering = {
            site: str(keys.RegistrationKey(self.run) if site in self._registered else keys.AdmissionKey(self.run, site))
            for site in signed
        }
        gathering[self.site] = self._gathering
        trusted = trusted_keys(signed, self._credential, gathering=gathering, credential_file=self._credential_file)
        self._trusted = dict(signed)
        self._report(str(trusted))

    def _meet(self, cohort: tuple[str, ...]) -> None:
        """Add sites that were admitted later to the match; check their keys."""
        for site in cohort:
            if site not in self.match.keys:
                with self.transport.result(keys.AdmissionKey(self.run, site)) as document:
                    self.match = late_join.with_site(self.match, document.message, site)
        self._trust(self.match.keys)

    # ---------------------------------------------------------------------------------------------------- rounds
    def note_aggregate(self, message: messages.Aggregate, weights: Weights) -> None:
        """Remember the aggregate that the next round starts from.

        Args:
            weights: As downloaded, under canonical names.
        """
        self._aggregates = [*self._aggregates, (message, weights)][-2:]
        if message.round is not None and self._num_rounds is not None:
            self.is_over |= message.round + 1 >= self._num_rounds

    def exchange(self, number: int, weights: Weights, update: messages.Update) -> Document[messages.Aggregate]:
        """Mask the weights of a round, help to unmask the sum, and return the aggregate.

        A site that is not of the round's cohort, or came too late, only receives it, and is in the next one.

        Raises:
            DivergedError: A weight has grown too much; nothing was sent.
            RefusedError: See `Masking`.
        """
        key, upload_key = keys.RoundKey(self.run, number), keys.UploadKey(self.run, number)
        plan = self._plan(key)
        if plan is None:
            self._report(f"Round {number} goes on without this site, which takes part from the next one on")
            return self.transport.result(key)
        try:
            document = self._take_part(key, upload_key, plan, weights, update)
        except RefusedError as error:
            if error.code not in OPERATORS_AFFAIR:
                raise
            self._report(str(error))
            reason = error.code if error.code == "round_spent" else str(error)  # which may name a site
            self.transport.report_failure(self.run, number, reason)  # with a quorum, the others go on
            document = self.transport.result(key)  # this site's update may be in it
        message = document.message
        assert isinstance(message, messages.Aggregate) and message.round is not None
        self.is_over |= message.round < number  # the operator has stopped it
        if message.round >= number:
            if self.site in message.contributors:
                self._codec.settle(unsealed(plan, message.contributors))
            self._outbox.drop(str(upload_key))
        return document

    def _take_part(
        self, key: keys.RoundKey, upload_key: keys.UploadKey, plan: RoundPlan, weights: Weights, update: messages.Update
    ) -> Document[messages.Aggregate]:
        self._outbox.drop_others([str(upload_key)])
        sent = self._masking.upload(upload_key, plan.sum, self._numbers(plan, weights, update), self._weight)
        survivors_key = keys.SurvivorsKey(self.run, key.number)
        return self._masking.unmask(upload_key, survivors_key, key, plan.sum, sent)

    def _plan(self, key: keys.RoundKey) -> RoundPlan | None:
        """Return the sums of a round; None if this site is outside its cohort."""
        if not self._aggregates:
            raise FederationError(f"{key}: this site does not know what the round starts from")
        start, values = self._aggregates[-1]
        before = -1 if start.round is None else start.round
        if start.next_round is None or before != key.number - 1:
            raise WireError(
                f"the coordinator has sent the aggregate of round {before}, without a cohort for {key}: use matching "
                "versions, or start with --c"
            )
        if self.site not in start.next_round.cohort:
            return None
        self._meet(start.next_round.cohort)
        self._check_networks(start.next_round.cohort)
        return plan_round(
            key,
            training=self._training(start.next_round.cohort),
            federation=self._credential.federation,
            match=self.match,
            specs=self._specs,
            begin=start.next_round,
            least=self._least,
            read=values.__getitem__,
            read_before=self._values_before(key.number),
            weights={self.site: self._weight},
        )

    def _values_before(self, number: int) -> Callable[[str], np.ndarray] | None:
        """Return the aggregate before the one that a round starts from, where its changes are needed."""
        if number == 0 or self.match.precision == "float32":
            return None
        wanted = number - 2 if number > 1 else None
        for message, values in self._aggregates:
            if message.round == wanted:
                return values.__getitem__
        key = keys.RoundKey(self.run, number - 2) if number > 1 else keys.InitialKey(self.run)
        document: Document[messages.Aggregate] = self.transport.result(key)
        found = {name: document.read(name) for name in self._specs}
        if document.message.round != wanted:
            raise FederationError(f"run {self.run} has gone on while this site returned: start with --c once more")
        self._aggregates.insert(0, (document.message, found))
        return found.__getitem__

    def _numbers(self, plan: RoundPlan, weights: Weights, update: messages.Update) -> dict[str, Fill]:
        """Return the function that fills each lane of a round."""
        _, start = self._aggregates[-1]

        def fill_group(name: str) -> Fill:
            def fill(words: np.ndarray) -> None:
                begin = 0
                for tensor in plan.group(name).tensors:
                    size = self._specs[tensor].size
                    self._codec.encode_(
                        tensor,
                        weights[tensor],
                        start[tensor],
                        weight=self._weight,
                        bits=plan.weight_bits,
                        exponent=plan.exponents[tensor],
                        out=words[begin : begin + size],
                    )
                    begin += size

            return fill

        def fill_changes(words: np.ndarray) -> None:
            rms = rms_change(weights, start)
            typical = plan.typical_change
            is_conspicuous = typical is not None and rms > OUTLIER_FACTOR * typical > 0
            if is_conspicuous:
                self._report(
                    f"This site has moved {rms / (typical or 1):.3g} times as far as the sites did in the round "
                    "before. The others learn that one has, not which"
                )
            words[:] = encode_figure(min(rms, LARGEST_CHANGE), self._weight, bits=CHANGE_BITS), int(is_conspicuous)

        numbers: dict[str, Fill] = {group.name: fill_group(group.name) for group in plan.groups}
        numbers[CHANGES] = fill_changes
        earlier = {} if update.earlier is None else update.earlier.metrics
        for lane, metrics in ((TRAINING, update.metrics), (VALIDATED, update.metrics), (EARLIER, earlier)):
            figures = self._figures([metrics.get(name) for name in FIGURES[lane]])
            if figures is not None:
                numbers[lane] = _fill_with(figures)
        return {lane.name: numbers[lane.name] for lane in plan.sum.held_by(self.site) if lane.name in numbers}

    def _figures(self, values: list[messages.Metric]) -> list[int] | None:
        """Return weighted figures as integers; None unless all are numbers that can travel."""
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return None
        try:
            return [encode_figure(float(value), self._weight) for value in values]  # type: ignore[arg-type]
        except ValueError:
            return None

    # ---------------------------------------------------------------------------------------------- validations
    def send_validation(
        self, aggregate: messages.Aggregate, found: messages.Validation, *, is_last: bool
    ) -> str | None:
        """Send a validation's masked counts; return the reason of a failure.

        Nobody waits for it: the shares to unmask the sum are sent with the next round, or here if there is none.
        """
        number = aggregate.round
        assert number is not None
        key = keys.ValidationKey(self.run, number)
        num_classes = num_classes_of(self._registration.dataset_json.labels)
        validated = next((values for message, values in self._aggregates if message.round == number), None)
        if validated is None:
            return f"the aggregate of round {number} is not the last one that this site has downloaded"
        try:
            self._check_networks(aggregate.contributors)
            plan = plan_validation(
                key,
                training=self._training(aggregate.contributors),
                federation=self._credential.federation,
                match=self.match,
                sites=aggregate.contributors,
                num_classes=num_classes,
                least=self._least,
                weights={self.site: self._weight},
                validated=validated,
            )
            if len(found.tp) != num_classes:
                return f"{len(found.tp)} classes were counted, and the dataset has {num_classes}"
            numbers: dict[str, Fill] = {
                group.name: _fill_with(
                    [round(one[place]) for one in (found.tp, found.fp, found.fn) for place in group.classes]
                )
                for group in count_groups(self.match, aggregate.contributors, num_classes, least=self._least)
                if self.site in group.holders
            }
            loss = self._figures([found.loss])
            if loss is not None:
                numbers[LOSS] = _fill_with(loss)
            upload_key = keys.ValidationUploadKey(self.run, number)
            sent = self._masking.upload(upload_key, plan, numbers, self._weight, patience_s=VALIDATION_PATIENCE_S)
        except FederationError as error:
            return str(error)
        self._unfinished.append((number, plan, sent))
        return self.finish_validations(wait_s=VALIDATION_PATIENCE_S) if is_last else None

    def finish_validations(self, *, wait_s: float) -> str | None:
        """Help to unmask the validations whose counts were sent; return the reason of a failure.

        Args:
            wait_s: How long to wait for the others.
        """
        unfinished, self._unfinished = self._unfinished, []
        for number, plan, sent in unfinished:
            upload_key = keys.ValidationUploadKey(self.run, number)
            survivors_key, key = keys.ValidationSurvivorsKey(self.run, number), keys.ValidationKey(self.run, number)
            try:
                self._masking.unmask(upload_key, survivors_key, key, plan, sent, wait_s=wait_s)
                self._outbox.drop(str(upload_key))
            except FederationError as error:
                return f"validation of round {number}: {error}"
        return None


def unsealed(plan: RoundPlan, contributors: Collection[str]) -> list[str]:
    """Return the tensors whose sums were opened: those that enough contributors hold."""
    return [
        name
        for group in plan.groups
        if len({*group.holders} & {*contributors}) >= plan.sum.least
        for name in group.tensors
    ]


def rms_change(weights: Weights, start: Weights) -> float:
    """Return the root mean square of the difference of the tensors that both have."""
    squares, size = 0.0, 0
    for name in sorted(weights.keys() & start.keys()):
        one, other = weights[name].reshape(-1), start[name].reshape(-1)
        for begin in range(0, one.size, _BLOCK):
            difference = np.subtract(one[begin : begin + _BLOCK], other[begin : begin + _BLOCK], dtype=np.float64)
            squares += float(np.square(difference, out=difference).sum())
        size += one.size
    return math.sqrt(squares / size) if size else 0.0


def _fill_with(numbers: list[int]) -> Fill:
    def fill(words: np.ndarray) -> None:
        words[:] = np.array(numbers, np.uint64)

    return fill
