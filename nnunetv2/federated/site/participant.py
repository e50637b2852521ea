"""Take part in a training run: register, start, exchange every round, rejoin.

Knows weights as named arrays and the coordinator as a `Transport`; knows nothing of networks, trainers or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.federated.aggregation.codecs import codec_of
from nnunetv2.federated.aggregation.codecs.base import UpdateCodec
from nnunetv2.federated.aggregation.codecs.float32 import Float32
from nnunetv2.federated.aggregation.matching import SHAREABLE
from nnunetv2.federated.errors import FederationError, MatchingError, NonFiniteError, RefusedError, WireError
from nnunetv2.federated.exchanges.outlook import Outlook
from nnunetv2.federated.exchanges.steps.weights import check_round
from nnunetv2.federated.privacy import require_secure
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.document import Document, TensorSpec, file_digest
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transport import VALIDATION_PATIENCE_S, Transport

if TYPE_CHECKING:
    from nnunetv2.federated.protocol.api import FederationSettings
    from nnunetv2.federated.site.masked_run import MaskedRun

Weights = Mapping[str, np.ndarray]
"""Local name -> array: float32, or as they came from the coordinator, which may be float16."""
EVERY_EPOCH = Rounds()
FINISHING_PATIENCE_S = 20.0
"""How long to wait for other sites in unmasking a validation; as a rule, all have sent their parts."""


@dataclass(frozen=True)
class Position:
    """Where a site that starts or returns has to go on."""

    epoch: int
    """The next epoch to train; the one behind the rounds that were closed if the run is over."""
    weights: Weights
    """The shared weights that the open round began with, under the site's own names; if the run is over, the last."""
    is_within: bool = False
    """Whether the site goes on within that round, from its own weights."""
    begins: bool = False
    """Whether the run begins now, with the initial weights of the sites that take part in it."""
    is_over: bool = False
    """Whether there is nothing left to train: the run is complete, or the operator has stopped it."""


class Participant:
    """A site's membership in one training run.

    Args:
        transport: The way to the coordinator.
        site: Name of this site.
        run: Name of the run, see `keys.run_name`.
        credential: Who this site is; needed where updates are masked.
        credential_file: Where that is; None: the one of this machine.
        report: Receives lines for the people at this site.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        site: str,
        run: str,
        credential: SiteCredential | None = None,
        credential_file: Path | None = None,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.transport = transport
        self.site = site
        self.run = run
        self.match: messages.Match | None = None
        self._tensors: dict[str, messages.TensorEntry] = {}
        """Local name -> entry of this site's registration."""
        self._codec: UpdateCodec = Float32()
        self._rests_due: int | None = None
        """The round whose update is to bring the rounding errors; None where that is not known."""
        self._received: str | None = None
        """SHA-256 of the aggregate that came last, as it travelled, where changes of it may come next."""
        self._credential = credential
        self._credential_file = credential_file
        self._report = report
        self.settings: FederationSettings | None = None
        """Those that the training obeys. None: they are asked for."""
        self._masked: MaskedRun | None = None
        """This site's part in a run whose updates are masked."""
        self._num_kept = 0
        """Shared tensors that the last round has left as they were."""

    def register(self, registration: messages.Registration) -> messages.Match:
        """Register this site's training, wait for the others, and return the match.

        A run that has begun without this site admits it; one that it has left takes it back.

        Raises:
            NotAllowedError: The federation masks less than this site requires.
            RefusedError: The networks, labels or channels of the sites do not go together.
            WireError: The tensors that the coordinator takes for shared are not those of this site.
        """
        plans_name = registration.plans.get("plans_name")
        state = self.transport.run_state(self.run, plans=None if plans_name is None else str(plans_name))
        if state.run not in (self.run, f"{self.run}.{plans_name}"):  # two runs under one name would share their masks
            raise WireError(f"the coordinator takes this training, {self.run}, for {state.run}: use matching versions")
        self.run = state.run  # another one where the sites have trained with other plans before
        has_begun = bool(state.members or state.left)
        is_late = has_begun and self.site not in state.registered
        key = keys.AdmissionKey(self.run, self.site) if is_late else keys.RegistrationKey(self.run)
        masked = self._masked_run()
        if masked is not None and state.closed:  # of a run that is over, only the last average is wanted
            masked.forget()
            masked = None
        self._masked = masked
        if self._masked is not None:
            is_known = self.site in state.registered or self.site in state.members
            registration = self._masked.sign_registration(registration, key, is_known=is_known)
        answer = self.transport.exchange(key, registration).message
        if self.site in state.left:
            self.transport.act(self.run, "return")
        if self.site not in answer.coverage:
            raise MatchingError(f"site {self.site} is not among those that registered for run {self.run}")
        self._tensors = {entry.name: entry for entry in registration.tensors}
        check_match(answer, self.site, self._tensors)
        self.match = answer
        self._codec = codec_of(answer.precision)
        if self._masked is not None:
            registered = state.registered if is_late else tuple(answer.coverage)
            self._masked.begin(answer, registration, registered)
        return answer

    def _masked_run(self) -> MaskedRun | None:
        """Return this site's part in a run whose updates are masked; None where they travel in clear."""
        if self._credential is None:
            return None
        settings = self.settings or self.transport.settings()
        require_secure.check_settings(settings, self._credential.secure)
        if settings.secure is None:
            return None
        from nnunetv2.federated.site.masked_run import MaskedRun

        return MaskedRun(
            self.transport,
            self._credential,
            settings,
            run=self.run,
            report=self._report,
            credential_file=self._credential_file,
        )

    def describe_outlook(self) -> str:
        """Describe the common models that the coordinator expects of this run, in lines."""
        try:
            outlooks = self.transport.outlooks().runs
        except RefusedError as error:
            if error.code != "unknown_path":
                raise
            return "Whether there will be a common model, this coordinator (an older version) says when the run is over"
        found = next((one for one in outlooks if one.run == self.run), None)
        if found is None:
            return "It is not known whether there will be a common model"
        outlook = Outlook(found.trainer, found.obstacle, found.networks, found.coverage)
        text = str(outlook)
        return "\n".join((text[0].upper() + text[1:], *(f"  {line}" for line in outlook.details())))

    @property
    def local_names(self) -> dict[str, str]:
        """Canonical name -> this site's own name, of every tensor that it shares."""
        return self._match().names_at(self.site)

    def _match(self) -> messages.Match:
        if self.match is None:
            raise FederationError("register first: what is shared is not known yet")
        return self.match

    def start(
        self,
        epoch: int,
        weights: Weights,
        *,
        staleness: int = 0,
        rounds: Rounds = EVERY_EPOCH,
        num_epochs: int | None = None,
    ) -> Position:
        """Find out where to go on, and with which weights.

        Within the round that is open, a site goes on from its own weights.

        Args:
            epoch: The epoch that the site would train next on its own. It may be a round ahead of the run: a site that
                saved its weights before an exchange that did not come about trains that round again.
            weights: Its present weights. Where the run has not begun, those that this site owns become everybody's.
            staleness: By how many more rounds a site may be ahead, because it trains on while a round is exchanged.
                Such a site no longer knows the update that it has sent, so it begins the open round again.
            rounds: The epochs of a round.
            num_epochs: The epochs of the run, after the last of which its last round ends, however short it is.

        Raises:
            FederationError: The site's checkpoint is ahead of the run, so it belongs to another federation; or the
                operator has stopped the run before there was anything to go on from.
        """
        state = self.transport.run_state(self.run)
        if state.closed and state.rounds_closed == 0:
            raise FederationError(
                f"the operator has stopped run {self.run} before its first round was closed. Ask the coordinating site"
            )
        next_round = state.rounds_closed if state.closed else state.open_round
        if next_round is None:
            self._check_owns_nothing_trained(epoch)
            is_registered = self.site in state.registered
            return Position(0, self._begin(weights, is_registered=is_registered), begins=is_registered)
        check_round(next_round)
        self._check_is_not_ahead(epoch, next_round, farthest=rounds.first_epoch(next_round + 1 + staleness))
        first_epoch = rounds.first_epoch(next_round)
        key = keys.RoundKey(self.run, next_round - 1) if next_round else keys.InitialKey(self.run)
        document = self.transport.result(key)
        average = self._read(document)
        self._drop_rests_that_came(document.message)
        is_within = (
            not state.closed
            and not staleness
            and first_epoch < epoch
            and rounds.of(epoch) == next_round
            and epoch != num_epochs
        )
        return Position(epoch if is_within else first_epoch, average, is_within=is_within, is_over=state.closed)

    def _check_owns_nothing_trained(self, epoch: int) -> None:
        """Raise FederationError if a run would begin with weights that this site has trained alone."""
        if epoch > 0 and self.site in self._match().initial_owner.values():
            raise FederationError(
                f"run {self.run} has not begun, and this site's checkpoint is at epoch {epoch}: what it has "
                "trained alone would go to all others as it is, for they begin with its weights. Start without --c"
            )

    def _check_is_not_ahead(self, epoch: int, next_round: int, *, farthest: int) -> None:
        """Raise FederationError if this site's checkpoint is ahead of the run."""
        if epoch > farthest:
            raise FederationError(
                f"run {self.run} is at round {next_round}, this site's checkpoint at epoch {epoch}: it comes from "
                "another federation, or the coordinator was restored from a backup. Start without --c to go on with "
                "this run, or use the credential of the other federation."
            )

    def exchange(self, number: int, weights: Weights, update: messages.Update) -> tuple[Weights, messages.Aggregate]:
        """Exchange a round's shared weights; return the aggregate under local names.

        It may be that of another round, as its message says: of a later one if this site was late, of an earlier one
        if the operator has stopped the run.

        Args:
            update: The message that travels with the weights.

        Raises:
            NonFiniteError: The weights hold NaN or infinity; nothing was sent.
            PrecisionError: A weight is too large for the precision of the federation; nothing was sent.
            FederationError: This site has left the run.
        """
        shared = self._under_canonical_names(weights, self.local_names)
        check_finite(weights)
        is_counted = True

        def note(counts: bool) -> None:
            nonlocal is_counted
            is_counted = counts

        try:
            if self._masked is not None:
                document = self._masked.exchange(number, shared, update)
            else:
                form: dict[str, Any] = {"since": self._received, "told": note} if self._codec.is_relative else {}
                sent = self._codec.encode(shared)
                document = self.transport.exchange(keys.RoundKey(self.run, number), update, sent, **form)
        except RefusedError as error:
            raise self._explained(error) from error
        if self._masked is None and self.site in document.message.contributors:
            if is_counted:
                self._codec.settle()
            else:  # another update has brought the rests before, and its own rounding errors are lost
                self._codec.forget_rests()
        self._rests_due = None if document.message.round is None else document.message.round + 1
        answer = self._read(document), document.message
        self._report_kept(document.message)
        if self._masked is not None:
            self._masked.finish_validations(wait_s=FINISHING_PATIENCE_S)
        return answer

    def _report_kept(self, average: messages.Aggregate) -> None:
        """Report shared tensors that keep their values, or no longer do.

        They keep them while too few of their sites take part. Sites that were admitted later may have any of them.
        """
        if self.settings is None or not average.contributors:
            return
        match, least = self._match(), self.settings.min_sites
        known, took_part = match.coverage.keys(), average.contributors.keys()
        holders = [match.shared[name].keys() | (took_part - known) for name in self.local_names]
        number = sum(len(sites & took_part) < least for sites in holders)
        if number > self._num_kept:
            self._report(
                f"{number} of {len(holders)} shared tensors keep their values of the round before, since fewer than "
                f"{least} of the sites that have them took part: what this site has trained of them does not count"
            )
        elif number < self._num_kept:
            self._report(f"{self._num_kept - number} tensors that kept their values are averaged again")
        self._num_kept = number

    def wants_validation(self, aggregate: messages.Aggregate, *, is_last: bool) -> bool:
        """Tell whether this site is to validate an aggregate, by the present settings."""
        if aggregate.round is None or self.site not in aggregate.contributors:
            return False
        try:
            every = self.transport.settings(patience_s=VALIDATION_PATIENCE_S).validate_every
        except FederationError:
            return False  # a coordinator that is away is the next exchange's affair
        return every > 0 and (is_last or (aggregate.round + 1) % every == 0)

    def send_validation(
        self, aggregate: messages.Aggregate, found: messages.Validation, *, is_last: bool = False
    ) -> str | None:
        """Send the validation of an aggregate; return the reason of a failure.

        Nobody waits for it, and no training ends because of it.
        """
        number = aggregate.round
        assert number is not None  # the initial weights are not validated
        if self._masked is not None:
            return self._masked.send_validation(aggregate, found, is_last=is_last)
        try:
            self.transport.contribute(keys.ValidationKey(self.run, number), found, patience_s=VALIDATION_PATIENCE_S)
        except FederationError as error:
            return str(error)
        return None

    def _begin(self, weights: Weights, *, is_registered: bool) -> Weights:
        """Exchange the initial weights; a newcomer only receives them."""
        key = keys.InitialKey(self.run)
        if not is_registered:
            return self._fetch(key)
        owners = self._match().initial_owner
        owned = {name: local for name, local in self.local_names.items() if owners[name] == self.site}
        update = self._under_canonical_names(weights, owned)
        check_finite(update)
        if not self._codec.is_relative:
            self._codec.encode(update)  # raises for values that could not come back
        return self._read(self.transport.exchange(key, messages.Update(), update))

    def _explained(self, error: RefusedError) -> FederationError:
        """Explain a refusal where this site has left the run itself."""
        if error.code == "not_expected" and self.site in self.transport.run_state(self.run).left:
            return FederationError(
                f"site {self.site} has left run {self.run}: its rounds go on without it. "
                "nnUNetv2_train ... --c returns to it"
            )
        return error

    def _fetch(self, key: keys.ExchangeKey[Any, messages.Aggregate]) -> Weights:
        return self._read(self.transport.result(key))

    @staticmethod
    def _under_canonical_names(weights: Weights, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        return {name: weights[local] for name, local in sorted(names.items())}

    def _read(self, document: Document[messages.Aggregate]) -> Weights:
        """Map the aggregate to local names, checked as the coordinator checks an update.

        Raises:
            WireError: A tensor is missing, so that the site would train on half a network, or not expected; one has
                another shape or dtype than it is to have, or holds NaN or infinity.
        """
        names = self._match().received_by(self.site)
        missing, unexpected = names.keys() - document.specs.keys(), document.specs.keys() - names.keys()
        if missing:
            raise WireError(f"the coordinator's aggregate lacks tensor {min(missing)} ({len(missing)} in all)")
        if unexpected and self._tensors:
            raise WireError(
                f"the coordinator's aggregate holds tensor {min(unexpected)}, which is not shared "
                f"({len(unexpected)} in all)"
            )
        came = {name: document.read(name) for name in names}
        for name, local in names.items():
            self._check_tensor(name, came[name], self._tensors.get(local))
        received = self._codec.receive(came)
        if self._codec.is_relative:
            self._received = file_digest(document.path)
        if self._masked is not None:
            self._masked.note_aggregate(document.message, received)
        return {local: received[name] for name, local in names.items()}

    def _check_tensor(self, name: str, values: np.ndarray, registered: messages.TensorEntry | None) -> None:
        """Raise WireError unless a tensor is finite and of the expected dtype and shape."""
        problem = None
        is_change = self._codec.is_relative and values.dtype == np.int8
        if values.dtype.kind != "f" and not is_change:
            problem = f"is of {values.dtype}"
        elif registered is not None:
            kept, found = TensorSpec("F32", registered.shape), TensorSpec.of(values)
            is_whole = self._codec.is_relative and not is_change
            expected = kept if is_whole else self._codec.specs({name: kept})[name]
            problem = f"is {found}, expected {expected}" if found != expected else None
        if problem is None and not np.isfinite(values).all():
            problem = "holds NaN or infinity"
        if problem is not None:
            raise WireError(
                f"tensor {name} of the coordinator's aggregate {problem}: nothing was loaded. Ask the coordinating site"
            )

    @property
    def megabytes(self) -> float:
        """Return the size of this site's updates, and of their aggregates, as they travel."""
        specs = {name: TensorSpec("F32", self._tensors[local].shape) for name, local in self.local_names.items()}
        return sum(spec.nbytes for spec in self._codec.specs(specs).values()) / 1e6

    def rests(self) -> tuple[dict[str, np.ndarray], int | None]:
        """Return the rounding errors still due, and their round, for a checkpoint."""
        return self._codec.rests(), self._rests_due

    def take_over(self, rests: Mapping[str, np.ndarray], due: int | None) -> None:
        """Restore a checkpoint's rounding errors, after `register` and before `start`."""
        self._codec.take_over({name: values for name, values in rests.items() if name in self.local_names})
        self._rests_due = due

    def _drop_rests_that_came(self, last: messages.Aggregate) -> None:
        """Forget a checkpoint's rounding errors if their update may have counted.

        The site was ended before it knew, and the rounding errors of that update are lost. Who took part in a round
        before the last one is no longer known.
        """
        due = self._rests_due
        if last.round is None or due is None:
            return
        if last.round > due or (last.round == due and self.site in last.contributors):
            self._codec.forget_rests()

    def finish(self) -> None:
        """Forget the keys of a run that is over."""
        if self._masked is not None and self._masked.is_over:
            self._masked.forget()

    def report_failure(self, number: int | None, reason: str) -> None:
        """Report a failure, so that the others know whom they wait for."""
        self.transport.report_failure(self.run, number, reason)


def check_match(match: messages.Match, site: str, tensors: Mapping[str, messages.TensorEntry]) -> None:
    """Raise WireError unless a site's shared tensors are its own and distinct.

    It sends those that it trains, and no others. A site that trains a tensor and only received it would begin each
    round with values that nobody else compares.

    Args:
        tensors: Its own name -> registered entry.
    """
    shared = [*match.received_by(site).values()]
    unknown = sorted(name for name in shared if name not in tensors or tensors[name].dtype not in SHAREABLE)
    if unknown:
        raise WireError(
            f"the coordinator takes tensor {unknown[0]} for shared, which site {site} does not have or "
            f"cannot share ({len(unknown)} of {len(shared)}): use matching versions"
        )
    if len(set(shared)) < len(shared):
        raise WireError(f"the coordinator takes a tensor of site {site} for several: use matching versions")
    sent = {*match.names_at(site).values()}
    if wrong := sorted(name for name in shared if (name in sent) == bool(tensors[name].only_received)):
        raise WireError(
            f"tensor {wrong[0]} of site {site} is sent exactly if the site trains it; the coordinator wants it "
            f"otherwise ({len(wrong)} of {len(shared)}): use matching versions, else show this to the coordinating site"
        )


def check_finite(weights: Weights) -> None:
    """Raise NonFiniteError, naming the tensor, if any value is NaN or infinite."""
    broken = [name for name, values in weights.items() if not np.isfinite(values).all()]
    if broken:
        raise NonFiniteError(
            f"tensor {broken[0]} holds NaN or infinity ({len(broken)} of {len(weights)} tensors do): "
            "nothing was sent. Look at the last losses, and go on from the last checkpoint with --c"
        )
