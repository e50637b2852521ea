"""A real coordinator, reached over HTTP, that lies: it answers single sites with what a test makes of the truth."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fake_federation import LocalFederation, served
from masked_sites import masked_settings

from nnunetv2.federated.coordinator.site_service import Result
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.privacy.secure_aggregation.masking import apply_masks_
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.keys import Key

Tensors = Mapping[str, np.ndarray]
Lie = Callable[[str, messages.Message, Tensors], tuple[messages.Message, Tensors] | None]
"""(site, message, tensors) of an honest answer -> what the site gets instead; None: the truth."""


class Liar:
    """Answers for a coordinator. What it does not lie about is true."""

    def __init__(self, federation: LocalFederation) -> None:
        self.federation = federation
        self._folder = federation.state.store.folder.parent / "lies"
        self._folder.mkdir()
        self._numbers = itertools.count()
        self._lies: dict[str, Lie] = {}
        self._honest = federation.coordinator.result
        federation.coordinator.result = self._result

    def about(self, key: Key | str, lie: Lie) -> None:
        """Lie about the result of an exchange from now on."""
        self._lies[str(key)] = lie

    def stop(self, key: Key | str) -> None:
        """Tell the truth about an exchange again."""
        del self._lies[str(key)]

    def _result(self, key: str, site: str):
        answer = self._honest(key, site)
        if not isinstance(answer, Result) or key not in self._lies:
            return answer
        with open_document(answer.path) as document:
            message, tensors = document.message, {name: np.array(document.read(name)) for name in document.specs}
        told = self._lies[key](site, message, tensors)
        return answer if told is None else self._written(answer.key, *told)

    def _written(self, key: str, message: messages.Message, tensors: Tensors) -> Result:
        path = self._folder / f"{next(self._numbers)}.safetensors"
        specs = {name: TensorSpec.of(values) for name, values in tensors.items()}
        write_document(path, message, specs, tensors.values())
        return Result(key, path, hashlib.sha256(path.read_bytes()).hexdigest())

    def received(self, key: Key) -> dict[str, Path]:
        """Return the documents that sites have sent to an exchange, by site."""
        exchange = self.federation.state.registry.get(key)
        held = {} if exchange is None else exchange.contributions
        return {
            site: self.federation.state.store.contribution_path(key, site, one.digest) for site, one in held.items()
        }


@contextmanager
def lying(folder: Path, *, sites: str = "ABC", k: int = 3, **settings) -> Iterator[Liar]:
    """Serve a secure federation whose coordinator can lie."""
    settings = masked_settings(tuple(sites), k=k, **{"validate_every": 0, **settings})
    with served(folder / "federation", settings) as federation:
        yield Liar(federation)


class Seeds:
    """The seeds that sites have made, for a test that looks into sums as nobody can."""

    def __init__(self, monkeypatch) -> None:
        self.own: dict[tuple[str, str], bytes] = {}
        """(site, lane) -> the seed that is the site's own."""
        share_keys = protocol.share_keys

        def sharing(cohort, site, private_key, lanes, common):
            shared = share_keys(cohort, site, private_key, lanes, common)
            self.own.update({(site, lane.name): shared.seeds[lane.name, site] for lane in lanes})
            return shared

        monkeypatch.setattr(protocol, "share_keys", sharing)

    def sums(self, liar: Liar, key) -> dict[str, np.ndarray]:
        """Return the sum of each lane without the sites' own masks, as when all of them unmask it."""
        sums: dict[str, np.ndarray] = {}
        for site, path in liar.received(key).items():
            with open_document(path) as document:
                for lane in document.message.lanes:
                    words = np.array(document.read(f"masked.{lane}"))
                    apply_masks_(words, plus=[], minus=[self.own[site, lane]])
                    sums[lane] = words + sums[lane] if lane in sums else words
        return sums


def cancels(words: np.ndarray, num_sites: int = 3) -> bool:
    """Tell whether the masks in a sum cancel out, by its check words."""
    return bool(words[0] == num_sites and words[2] == words[3] == 0)
