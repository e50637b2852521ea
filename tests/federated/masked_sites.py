"""Sites that train a few numbers instead of a network, in federations whose updates are masked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from fake_federation import RUN, SHAPES, make_registration, make_settings, make_weights

from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FederationSettings, Secure
from nnunetv2.federated.protocol.keys import RoundKey, UploadKey
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.participant import Participant, Position

THREE = ("A", "B", "C")
FIVE = ("A", "B", "C", "D", "E")


def masked_settings(sites=THREE, *, k: int = 3, num_epochs: int | None = 3, **others) -> FederationSettings:
    others = {"min_sites": k, "validate_every": 1, **others}
    return make_settings(sites=sites, num_epochs=num_epochs, secure=Secure(k=k), **others)


class MaskedSite:
    """A site that takes part in a masked run, and can be stopped and started again at any place.

    Args:
        transport: The way to the coordinator.
        credential: Who the site is.
        folder: Where the credential file lies, `credential.<site>.json`.
        seed: Of its initial weights, and of what it learns.
    """

    def __init__(
        self,
        transport,
        credential: SiteCredential,
        file: Path,
        *,
        seed: int,
        num_cases: int | None = None,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        plans: dict | None = None,
        trained: Callable[[int], float] = lambda number: 0.0,
    ) -> None:
        self.seed = seed
        self.lines: list[str] = []
        self.shapes = shapes
        self.registration = make_registration(seed + 1 if num_cases is None else num_cases, shapes, plans=plans)
        self.participant = Participant(
            transport,
            site=credential.site,
            run=RUN,
            credential=credential,
            credential_file=file,
            report=self.lines.append,
        )
        self.trained = trained
        self.position: Position | None = None
        self.pause_s = 0.0
        """How long an epoch takes."""

    def register(self) -> messages.Match:
        return self.participant.register(self.registration)

    def start(self, epoch: int = 0) -> Position:
        self.position = self.participant.start(epoch, make_weights(self.seed, self.shapes))
        return self.position

    def epoch(self, number: int, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights after an epoch: those of this site, shared or not."""
        own = make_weights(self.seed, self.shapes)
        shift = np.float32(0.01 * (self.seed + number) + self.trained(number))
        return {name: weights.get(name, values) * np.float32(0.9) + shift for name, values in own.items()}

    def round(self, number: int, weights: Mapping[str, np.ndarray]) -> tuple[dict, messages.Aggregate]:
        """Train an epoch, and exchange it."""
        earlier = None
        if number:
            earlier = messages.EarlierMetrics(
                round=number - 1, metrics={"val_losses": -0.5 - 0.1 * self.seed, "mean_fg_dice": 0.5 + 0.1 * self.seed}
            )
        update = messages.Update(metrics={"train_losses": -0.25 * (self.seed + number)}, earlier=earlier)
        return self.participant.exchange(number, self.epoch(number, weights), update)

    def upload(self, number: int, weights: Mapping[str, np.ndarray]) -> None:
        """Do the first of the three steps of a round, as a site that is ended after it."""
        masked = self.participant._masked
        plan = masked._plan(RoundKey(RUN, number))
        update = messages.Update(metrics={"train_losses": 0.0})
        shared = self.participant._under_canonical_names(self.epoch(number, weights), self.participant.local_names)
        masked._masking.upload(UploadKey(RUN, number), plan.sum, masked._numbers(plan, shared, update), masked._weight)

    def join(self) -> dict[str, np.ndarray]:
        """Register and start; return the weights to go on from."""
        self.register()
        return dict(self.start().weights)

    def validate(self, aggregate: messages.Aggregate, *, is_last: bool) -> str | None:
        """Validate an aggregate where the federation wants that; return the reason of a failure."""
        if not self.participant.wants_validation(aggregate, is_last=is_last):
            return None
        tp = float(10 * (aggregate.round + 1) + self.seed)
        found = messages.Validation(tp=(tp,), fp=(1.0,), fn=(2.0,), loss=-0.5 * (self.seed + 1))
        return self.participant.send_validation(aggregate, found, is_last=is_last)

    def train(self, num_rounds: int, on_round: Callable[[int], None] = lambda number: None) -> str:
        """Take part from wherever the run is, to its end; return the digest of the last aggregate."""
        self.register()
        position = self.start()
        weights, number = position.weights, position.epoch
        while number < num_rounds and not position.is_over:
            time.sleep(self.pause_s)
            weights, aggregate = self.round(number, weights)
            self.validate(aggregate, is_last=aggregate.round + 1 >= num_rounds)
            number = aggregate.round + 1
            on_round(number)
        self.participant.finish()
        return digest_of(weights)


def digest_of(weights: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of shared weights."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def masked_site(federation, site: str, *, seed: int, **options) -> MaskedSite:
    """Return a site of a federation that is served by a thread."""
    credential = federation.credential(site)
    file = federation.coordinator.state.store.folder / f"credential.{site}.json"
    return MaskedSite(federation.client(site), credential, file, seed=seed, **options)


def mean_of(sites, start, number):
    """Return what a plain weighted mean would be: names -> float64."""
    total = sum(site.registration.num_training_cases for site in sites)
    trained = [(site.registration.num_training_cases, site.epoch(number, start)) for site in sites]
    return {name: sum(cases * weights[name].astype(np.float64) for cases, weights in trained) / total for name in start}
