"""Follow the audit log: what the page, the figures and the coordinator's output have to know of it.

The log grows with every contribution. It is read once, in pieces, and from then on only what was appended.
"""
from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from nnunetv2.federated.audit import START
from nnunetv2.federated.model_keeping import without_values
from nnunetv2.federated.store import Store

TROUBLE = ("failure", "refusal", "late")
"""Events that a person should look into."""
SHOWN_TROUBLES = 50
_LINES_AT_ONCE = 2000


@dataclass(frozen=True)
class Trouble:
    """A failure at a site, a contribution that was refused, or one that came too late."""

    time: float
    kind: Literal["failure", "refusal", "late"]
    site: str | None
    key: str
    """The run or gathering that it was about."""
    text: str


class LogTail:
    """What the audit log says, as far as it has been read. Safe for use by several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = Lock()
        self.number = 0
        """The last line that was read."""
        self.head = START
        """Its hash."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """Events by kind and by who caused them."""
        self.troubles: deque[Trouble] = deque(maxlen=SHOWN_TROUBLES)
        self.models: dict[str, str] = {}
        """Run -> where its model is, or why there is none."""
        self._reasons: dict[tuple[str, str], str] = {}

    def read_on(self) -> None:
        """Read what has been appended."""
        with self._lock:
            while lines := self._store.load_log(self.number, _LINES_AT_ONCE):
                for number, moment, kind, site, key, detail, digest in lines:
                    self._take(moment, kind, site, key or "", json.loads(detail) if _is_read(kind) else {})
                    self.number, self.head = number, digest

    def reason(self, run: str, site: str) -> str:
        """Return why a site reported its last failure in a run."""
        return self._reasons.get((run, site), "")

    def _take(self, moment: float, kind: str, site: str | None, key: str, detail: Mapping[str, Any]) -> None:
        self.counts[kind, site or ""] += 1
        if kind == "model":
            self.models[key] = without_values(detail.get("outcome", ""))
        elif kind == "failure":
            self._reasons[detail["run"], site] = detail["reason"]
            number = detail.get("round")
            where = detail["run"] if number is None else f"{detail['run']}, round {number}"
            self.troubles.append(Trouble(moment, kind, site, where, detail["reason"]))
        elif kind == "refusal":
            self.troubles.append(Trouble(moment, kind, site, key, without_values(detail["message"])))
        elif kind == "late":
            text = f"came {detail['seconds']:.1f} s after the round was closed, and does not count"
            self.troubles.append(Trouble(moment, kind, site, key, text))


def _is_read(kind: str) -> bool:
    return kind in TROUBLE or kind == "model"
