"""Contribute to masked sums, in three exchanges with the coordinator.

Knows numbers, keys and the coordinator as a `Transport`; the meaning of numbers is in `masked_run.py`. Steps that must
not happen twice, also after a crash, are in `outbox.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.federated.exchanges.secure_sums import OPTIONAL, SecureSum
from nnunetv2.federated.exchanges.steps.secure_sum import (
    COMMITMENTS,
    ENVELOPE,
    MASKED,
    SHARES,
    Confirmations,
    Uploads,
    check_confirmations,
)
from nnunetv2.federated.privacy import identities
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.keys import ExchangeKey, R
from nnunetv2.federated.protocol.secure_messages import (
    Confirmation,
    Confirmed,
    MaskedUpdate,
    Survivors,
    UnmaskingShares,
)
from nnunetv2.federated.site.outbox import Outbox
from nnunetv2.federated.site.transport import Transport

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Fill = Callable[[np.ndarray], None]
"""Writes numbers into the words of a lane."""


@dataclass(frozen=True)
class SiteKeys:
    """The secrets of this site in one run, or in one pooling."""

    identity: Ed25519PrivateKey
    private_key: bytes = field(repr=False)
    """Of its run key."""


class Masking:
    """This site's part in masked sums.

    Args:
        transport: The way to the coordinator.
        site: Name of this site.
        keys: Its secrets.
        outbox: Its masked documents and promises.
    """

    def __init__(self, transport: Transport, *, site: str, keys: SiteKeys, outbox: Outbox) -> None:
        self.transport = transport
        self.site = site
        self.keys = keys
        self.outbox = outbox

    def upload(
        self,
        key: Uploads,
        found: SecureSum,
        numbers: Mapping[str, Fill],
        weight: int,
        *,
        patience_s: float | None = None,
    ) -> frozenset[str]:
        """Mask this site's numbers, unless done before, and send them.

        Args:
            key: Of the masked vectors.
            found: The sum to contribute to.
            numbers: Lane -> function that fills its words. Called once, before anything leaves.
            weight: The weight of this site.
            patience_s: See `Transport.contribute`.

        Returns:
            The names of the lanes that were sent.

        Raises:
            RefusedError: `round_spent`: something else was masked for this exchange before.
        """
        lanes = [lane for lane in found.held_by(self.site) if lane.name in numbers]
        context = protocol.context_digest(found.cohort, [found.lane(lane.name) for lane in found.held_by(self.site)])
        document = self.outbox.held(str(key))
        if document is not None:
            self.outbox.check_context(str(key), context)
        else:
            self.outbox.check_unspent(str(key), context)
            document = self._mask(key, context, found, lanes, numbers, weight)
        with document:
            tensors = {name: document.read(name) for name in document.specs}
            self.transport.contribute(key, document.message, tensors, patience_s=patience_s)
            return frozenset(document.message.lanes)

    def _mask(
        self,
        key: Uploads,
        context: str,
        found: SecureSum,
        lanes: list[protocol.Lane],
        numbers: Mapping[str, Fill],
        weight: int,
    ) -> Document[MaskedUpdate]:
        """Mask lane by lane, and write the document to the outbox."""
        shared = protocol.share_keys(found.cohort, self.site, self.keys.private_key, lanes, found.common(self.site))

        def masked(lane: protocol.Lane) -> np.ndarray:
            words = protocol.with_check_words(lane, weight)
            numbers[lane.name](words[CHECK_WORDS:])
            protocol.mask_input_(words, lane, self.site, shared)
            return words

        envelopes = {ENVELOPE + site: np.frombuffer(one, np.uint8) for site, one in sorted(shared.envelopes.items())}
        specs = {MASKED + lane.name: TensorSpec(lane.dtype, (lane.length,)) for lane in lanes}
        specs |= {name: TensorSpec.of(values) for name, values in envelopes.items()}
        specs[COMMITMENTS] = TensorSpec.of(shared.commitments)
        message = MaskedUpdate(lanes={lane.name: lane.context(found.cohort).hex() for lane in lanes})
        tensors = chain(map(masked, lanes), envelopes.values(), [shared.commitments])  # one at a time
        return self.outbox.put(str(key), context, message, specs, tensors)

    def unmask(
        self,
        upload_key: Uploads,
        survivors_key: Confirmations,
        key: ExchangeKey[Any, R],
        found: SecureSum,
        sent: Collection[str],
        *,
        wait_s: float | None = None,
    ) -> Document[R]:
        """Wait for survivors, confirm them, give shares, and return the result.

        Where the run has gone on without this site, or was stopped, it only gets the result.

        Args:
            sent: Names of the lanes that this site has sent, as `upload` has returned them.
            wait_s: How long to wait for others, each time. None: as long as it takes.

        Raises:
            RefusedError: `second_set`, `survivors_implausible`, `survivors_unconfirmed`: the coordinator lies, or is
                broken; nothing was given. `false_envelope`: that, or another site is.
            StillOpenError: Others have not come in time.
        """
        with self.transport.result(upload_key, wait_s=wait_s) as document:
            survivors = dict(document.message.sent) if isinstance(document.message, Survivors) else {}
            envelopes = {
                name.removeprefix(ENVELOPE).partition(".")[0]: document.read(name).tobytes()
                for name in (document.specs if survivors else ())
            }
        if self.site in protocol.sites_among(survivors):
            confirmed = self._confirm(survivors_key, found, survivors, sent, wait_s)
            if confirmed is not None:
                check_confirmations(survivors_key, confirmed.signatures, found, survivors, least=found.cohort.threshold)
                shares = protocol.reveal_shares(
                    found.cohort, self.site, self.keys.private_key, found.lanes, survivors, envelopes, least=found.least
                )
                self.transport.contribute(key, UnmaskingShares(), {SHARES: shares})
        return self.transport.result(key, wait_s=wait_s)

    def _confirm(
        self,
        key: Confirmations,
        found: SecureSum,
        survivors: protocol.Survivors,
        sent: Collection[str],
        wait_s: float | None,
    ) -> Confirmed | None:
        """Sign the survivors, and return the signatures of the others too; None if the sum was abandoned."""
        protocol.check_survivors(
            found.cohort, found.lanes, survivors, site=self.site, sent=sent, least=found.least, optional=OPTIONAL
        )
        digest = protocol.survivors_digest(found.cohort, survivors)
        self.outbox.promise_survivors(str(key), digest)
        signature = identities.sign_survivors(
            self.keys.identity, federation=found.cohort.federation, gathering=str(key), digest=digest
        )
        self.transport.contribute(key, Confirmation(digest=digest, signature=signature))
        message = self.transport.result(key, wait_s=wait_s).message
        return message if isinstance(message, Confirmed) and message.signatures else None
