"""A coordinator in this process whose clock stands still and whose closer works on request."""

from __future__ import annotations

from fake_federation import RUN, incoming_path, make_registration, make_settings, make_weights

from nnunetv2.federated.coordinator import run_control
from nnunetv2.federated.coordinator.members import Member, create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import RunAction
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey

OPERATOR = Member("boss", "operator")


class Federation:
    """A coordinator whose clock stands still and whose closer works on request."""

    def __init__(self, folder, **settings) -> None:
        self.now = 1000.0
        self.store = Store(folder)
        if self.store.load_settings() is None:
            create_federation(self.store, make_settings(**settings), now=self.now)
        self.lines: list[str] = []
        self.coordinator = Coordinator(self.store, announce=self.lines.append, clock=lambda: self.now)

    def send(self, key: str, site: str, message, tensors=None):
        tensors = tensors or {}
        path = incoming_path(self.store)
        specs = {name: TensorSpec.of(values) for name, values in tensors.items()}
        digest = write_document(path, message, specs, tensors.values())
        receipt = self.coordinator.contribute(key, site, path, digest, path.stat().st_size)
        self.close()
        return receipt

    def close(self) -> None:
        closer = self.coordinator.closer
        while ready := closer._ready():
            for exchange in ready:
                closer._close(exchange.key)

    def start(self, *sites: str) -> None:
        """Register sites with 1, 2, 3... cases, and let them start from the first one's weights."""
        for number, site in enumerate(sites):
            self.send(RegistrationKey(RUN), site, make_registration(number + 1))
        for site in sites:
            owned = site == sites[-1]  # the site with most cases
            self.send(InitialKey(RUN), site, messages.Update(), make_weights(0) if owned else {})

    def update(self, number: int, site: str, seed: int):
        return self.send(RoundKey(RUN, number), site, messages.Update(), make_weights(seed))

    def aggregate(self, number: int, site: str = "A"):
        result = self.coordinator.result(RoundKey(RUN, number), site)
        with open_document(result.path) as document:
            return document.message, {name: document.read(name) for name in document.specs}

    def weights(self, number: int) -> dict[str, float]:
        """Return what each site counted in a round, as the coordinator remembers it."""
        (record,) = self.store.load_rounds(RUN, number, limit=1)
        return {site: contributed["weight"] for site, contributed in record["sites"].items()}

    def act(self, action: str, member: Member = OPERATOR, **others):
        run_control.act(self.coordinator, RUN, RunAction(action=action, **others), member)
        self.close()
        return self.coordinator.run_state(RUN)
