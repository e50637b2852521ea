"""Open earlier documents, and read the agreement of a run's sites."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation import late_join
from nnunetv2.federated.aggregation.codecs import codec_of
from nnunetv2.federated.aggregation.codecs.base import UpdateCodec
from nnunetv2.federated.exchanges.exchange import Closed, Exchange
from nnunetv2.federated.exchanges.secure_sums import RoundPlan, SecureSum, num_classes_of, plan_round, plan_validation
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import DTYPES, Document, TensorSpec, open_document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    ExchangeKey,
    FineKey,
    FingerprintSumKey,
    InitialKey,
    Key,
    Q,
    R,
    RegistrationKey,
    RoundKey,
    ValidationKey,
)


@dataclass(frozen=True)
class Agreement:
    """The agreement of a run's sites when they registered."""

    match: messages.Match
    specs: Mapping[str, TensorSpec]
    """Canonical name -> dtype and shape of every shared tensor."""
    weights: Mapping[str, float]
    """Site -> its weight in an average. The sites do not know each other's."""
    plans_names: Mapping[str, str]
    """Site -> the name of its plans."""
    trust: Mapping[str, str | None] = field(default_factory=dict)
    """Site -> how it knows the identities of the others, where updates are masked."""
    privacy: Mapping[str, messages.PrivacyDeclaration | None] = field(default_factory=dict)
    """Site -> its declaration of the training's differential privacy."""

    @property
    def codec(self) -> UpdateCodec:
        """Return a codec for the updates and aggregates of the rounds."""
        return codec_of(self.match.precision)

    def specs_from(self, site: str) -> dict[str, TensorSpec]:
        """Return the tensors that a site sends in every round."""
        return {name: spec for name, spec in self.specs.items() if site in self.match.shared[name]}

    def specs_for(self, site: str) -> dict[str, TensorSpec]:
        """Return the tensors that a site receives in every round."""
        names = self.match.received_by(site)
        return {name: spec for name, spec in self.specs.items() if name in names}

    def specs_owned_by(self, site: str) -> dict[str, TensorSpec]:
        """Return the tensors whose initial values a site sends."""
        return {name: spec for name, spec in self.specs.items() if self.match.initial_owner[name] == site}


class DocumentReader:
    """Open documents that were contributed or computed earlier.

    Args:
        contribution_path: (key, site, digest) -> file.
        result_path: Key -> file.
        find: Key -> its exchange, or None.
        admitted: Run -> the sites that joined it after it had begun.
        last_validation: Run -> the record of its newest pooled validation, or None.
        settings: Returns the settings in force; needed where sums are masked.
        given_path: SHA-256 of a checkpoint that the operator has given -> document with its weights.
    """

    def __init__(
        self,
        contribution_path: Callable[[str, str, str], Path],
        result_path: Callable[[str], Path],
        find: Callable[[Key], Exchange | None],
        admitted: Callable[[str], tuple[str, ...]] = lambda run: (),
        last_validation: Callable[[str], Mapping[str, Any] | None] = lambda run: None,
        settings: Callable[[], FederationSettings] | None = None,
        given_path: Callable[[str], Path] = Path,
    ) -> None:
        self._contribution_path = contribution_path
        self.result_path = result_path
        self._find = find
        self._admitted = admitted
        self._last_validation = last_validation
        self._settings = settings
        self._plans: dict[RoundKey, RoundPlan] = {}
        """Of the round that was asked for last in each run."""
        self._given_path = given_path
        self._lock = threading.Lock()
        self._agreements: dict[str, tuple[tuple[str, ...], Agreement]] = {}

    def is_closed(self, key: Key) -> bool:
        """Tell whether an exchange has its result."""
        exchange = self._find(key)
        return exchange is not None and exchange.is_closed

    def exchange(self, key: Key) -> Exchange:
        """Return an exchange that has begun."""
        return self._begun(key)

    def has_contributed(self, key: Key, site: str) -> bool:
        """Tell whether there is something that a site has contributed to an exchange."""
        exchange = self._find(key)
        return exchange is not None and site in exchange.contributions

    def contribution(self, key: ExchangeKey[Q, Any], site: str) -> Document[Q]:
        """Open a site's contribution to an exchange that has begun."""
        return open_document(self._contribution_path(key, site, self._begun(key).contributions[site].digest))

    def result(self, key: ExchangeKey[Any, R]) -> Document[R]:
        """Open the result of a closed exchange."""
        return open_document(self.result_path(key))

    def given_weights(self, digest: str) -> Document[messages.Aggregate]:
        """Open the weights of a checkpoint that the operator has given to all sites."""
        return open_document(self._given_path(digest))

    @contextmanager
    def contributions(self, exchange: Exchange) -> Iterator[dict[str, Document[Any]]]:
        """Open everything that counts in a closed exchange.

        Site -> document, in the order of the sites' names.
        """
        with ExitStack() as stack:
            yield {
                site: stack.enter_context(
                    open_document(self._contribution_path(exchange.key, site, exchange.contributions[site].digest))
                )
                for site in _contributors(exchange)
            }

    def pooled_fingerprint(self) -> dict[str, Any] | None:
        """Return the fingerprint that the sites have pooled, or None."""
        kinds: tuple[Callable[[int], Key], ...] = (FineKey, FingerprintSumKey)  # in clear, or masked
        for key_of in kinds:
            number = 0
            while self.is_closed(key_of(number)):
                with self.result(key_of(number)) as document:
                    if isinstance(document.message, messages.PooledFingerprint):
                        return document.message.fingerprint
                number += 1
        return None

    def messages_of(self, key: ExchangeKey[Q, Any]) -> dict[str, Q]:
        """Return the messages of a closed exchange's contributions: site -> message."""
        with self.contributions(self._begun(key)) as documents:
            return {site: document.message for site, document in documents.items()}

    def agreement(self, run: str) -> Agreement:
        """Return the agreement of a run's sites, also those admitted later.

        The registration is closed.
        """
        with self._lock:  # after a restart all sites ask at once, and one answer does for all
            admitted = self._admitted(run)
            known = self._agreements.get(run)
            if known is None or known[0] != admitted:
                known = self._agreements[run] = (admitted, self._read_agreement(run, admitted))
            return known[1]

    def _read_agreement(self, run: str, admitted: tuple[str, ...]) -> Agreement:
        with self.result(RegistrationKey(run)) as document:
            match = document.message
        for site in admitted:
            with self.result(AdmissionKey(run, site)) as document:
                match = late_join.with_site(match, document.message, site)
        specs: dict[str, TensorSpec] = {}
        weights, plans_names, trust, privacy = {}, {}, {}, {}
        for site, message in self.each_registration(run):
            canonical = {local: name for name, local in match.names_at(site).items()}
            for entry in message.tensors:
                if entry.name in canonical:  # dtype and shape are the same at all sites
                    specs.setdefault(canonical[entry.name], TensorSpec(entry.dtype, entry.shape))
            weights[site] = float(message.num_training_cases) if match.weighting == "cases" else 1.0
            plans_names[site] = str(message.plans.get("plans_name"))
            trust[site], privacy[site] = message.trust, message.privacy
        specs = {name: specs[name] for name in match.shared}
        return Agreement(match, specs, weights, plans_names, trust, privacy)

    def _begun(self, key: Key) -> Exchange:
        exchange = self._find(key)
        assert exchange is not None, key
        return exchange

    def plans_names(self, run: str) -> Mapping[str, str]:
        """Return the names of the plans that sites have registered with.

        Site -> name, also while some have not registered.
        """
        key = RegistrationKey(run)
        if self.is_closed(key):
            return self.agreement(run).plans_names
        names = {}
        for site in self._begun(key).contributions:
            with self.contribution(key, site) as document:
                names[site] = str(document.message.plans.get("plans_name"))
        return names

    def registrations(self, run: str) -> dict[str, messages.Registration]:
        """Return the registration of every site, in the order of names."""
        return dict(self.each_registration(run))

    def registration(self, run: str, site: str) -> messages.Registration:
        """Return the registration of a site, also of one admitted later."""
        key = AdmissionKey(run, site) if site in self._admitted(run) else RegistrationKey(run)
        with self.contribution(key, site) as document:
            return document.message

    def each_registration(self, run: str) -> Iterator[tuple[str, messages.Registration]]:
        """Yield every site and its registration, in the order of names.

        All at once are large.
        """
        registered = RegistrationKey(run)
        keys: dict[str, ExchangeKey[messages.Registration, messages.Match]] = {
            **dict.fromkeys(_contributors(self._begun(registered)), registered),
            **{site: AdmissionKey(run, site) for site in self._admitted(run)},
        }
        for site, key in sorted(keys.items()):
            with self.contribution(key, site) as document:
                yield site, document.message

    def last_validation(self, run: str) -> messages.PooledValidation | None:
        """Return the newest pooled validation of a run, or None."""
        record = self._last_validation(run)
        return None if record is None else messages.PooledValidation.model_validate_json(json.dumps(record))

    def best_round(self, run: str) -> int | None:
        """Return the round with the best aggregate so far.

        None if no aggregate was validated.
        """
        last = self.last_validation(run)
        return None if last is None else last.best_round

    def forget(self, run: str) -> None:
        """Forget the agreement of a run that begins anew."""
        with self._lock:
            self._agreements.pop(run, None)
            self._forget_plans(run)

    # ------------------------------------------------------------------------------------------------- masked sums
    @property
    def settings(self) -> FederationSettings:
        """The settings of the federation."""
        assert self._settings is not None, "this reader was made without settings"
        return self._settings()

    @property
    def is_masked(self) -> bool:
        """Tell whether this federation masks updates and statistics."""
        return self._settings is not None and self._settings().secure is not None

    def round_plan(self, key: RoundKey) -> RoundPlan:
        """Return the plan of a masked round.

        The aggregate that it starts from is there.
        """
        with self._lock:
            known = self._plans.get(key)
        if known is None:
            known = self._read_plan(key)
            with self._lock:
                self._forget_plans(key.run)
                self._plans[key] = known
        return known

    def _forget_plans(self, run: str) -> None:
        """Forget the plans of a run; the caller holds the lock."""
        for key in [key for key in self._plans if key.run == run]:
            del self._plans[key]

    def _read_plan(self, key: RoundKey) -> RoundPlan:
        agreement = self.agreement(key.run)
        with ExitStack() as stack:
            start = stack.enter_context(self.result(start_of(key)))
            begin = start.message.next_round
            assert begin is not None, f"{start_of(key)} names no cohort"
            read_before = None
            if key.number:
                before = stack.enter_context(self.result(start_of(RoundKey(key.run, key.number - 1))))
                read_before = partial(_handed_out, before, agreement.codec)
            return plan_round(
                key,
                federation=self.settings.federation,
                match=agreement.match,
                specs=agreement.specs,
                begin=begin,
                least=self.least,
                read=partial(_handed_out, start, agreement.codec),
                read_before=read_before,
                weights={site: round(agreement.weights[site]) for site in begin.cohort},
            )

    @property
    def least(self) -> int:
        """Sites that every masked sum is to have."""
        secure = self.settings.secure
        assert secure is not None
        return secure.k

    def num_classes(self, run: str) -> int:
        """Return the number of classes or regions that validations of a run count."""
        _, registration = next(self.each_registration(run))
        return num_classes_of(registration.dataset_json.labels)

    def validation_sum(self, key: ValidationKey) -> SecureSum:
        """Return the sums of a masked validation. The round is closed."""
        agreement = self.agreement(key.run)
        sites = _contributors(self._begun(RoundKey(key.run, key.number)))
        return plan_validation(
            key,
            federation=self.settings.federation,
            match=agreement.match,
            sites=sites,
            num_classes=self.num_classes(key.run),
            least=self.least,
            weights={site: round(agreement.weights[site]) for site in sites},
        )


def _contributors(exchange: Exchange) -> tuple[str, ...]:
    assert isinstance(exchange.outcome, Closed)
    return exchange.outcome.contributors


def start_of(key: RoundKey) -> ExchangeKey[Any, messages.Aggregate]:
    """Return the exchange with whose result the sites of a round begin."""
    return RoundKey(key.run, key.number - 1) if key.number else InitialKey(key.run)


def _handed_out(document: Document[messages.Aggregate], codec: UpdateCodec, name: str) -> np.ndarray:
    """Return a tensor of an aggregate as sites download it."""
    spec = document.spec(name)
    values = np.empty(spec.size, DTYPES[spec.dtype])
    if values.size:
        document.read_into(name, 0, values)
    return codec.handed_out(values)
