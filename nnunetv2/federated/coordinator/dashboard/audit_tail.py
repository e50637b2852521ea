"""Follow the audit log for the dashboard: counts, troubles, models.

The log grows with every contribution. At the start, its lines are counted, and only those that people have to know of
are read; from then on, the lines that are appended.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from nnunetv2.federated.coordinator.models.model_folder import without_values
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, START
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.utilities.plain_text import excerpt

TROUBLE = ("failure", "refusal", "late")
"""Events that a person should look into."""
SHOWN_TROUBLES = 50
_LINES_AT_ONCE = 2000


@dataclass(frozen=True)
class Trouble:
    """A failure at a site, a refused contribution, or a late one."""

    time: float
    kind: Literal["failure", "refusal", "late"]
    site: str | None
    key: str
    """The run or exchange that it was about."""
    text: str


class LogTail:
    """A digest of the audit log, as far as it has been read. Thread-safe.

    Args:
        is_run: Tells whether there is a run of a name. Before 2.8.1+fed.4, sites could make up names.
    """

    def __init__(self, store: Store, *, is_run: Callable[[str], bool]) -> None:
        self._store = store
        self._is_run = is_run
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
        self._reasons: dict[tuple[str, str | None], str] = {}

    def read_on(self) -> None:
        """Read the lines appended since the last call."""
        with self._lock:
            if self.number == 0:
                self._begin()
            while lines := self._store.load_log(self.number, _LINES_AT_ONCE):
                for number, moment, kind, site, key, detail, digest in lines:
                    self.counts[kind, site or ""] += 1
                    self._take(moment, kind, site, key or "", json.loads(detail) if _is_read(kind) else {})
                    self.number, self.head = number, digest

    def _begin(self) -> None:
        """Count the lines so far, and read the troubles and models."""
        last, self.head = self._store.load_head()
        self.counts.update(self._store.count_events(last))
        for moment, kind, site, key, detail in self._store.load_lines((*TROUBLE, "model"), last):
            self._take(moment, kind, site, key or "", json.loads(detail))
        self.number = last

    def reason(self, run: str, site: str) -> str:
        """Return why a site reported its last failure in a run."""
        return self._reasons.get((run, site), "")

    def _take(self, moment: float, kind: str, site: str | None, key: str, detail: Mapping[str, Any]) -> None:
        if kind == "model":
            self.models[key] = without_values(detail.get("outcome", ""))
        elif kind == "failure":
            run, reason = (excerpt(detail[name], LOGGED_CHARACTERS) for name in ("run", "reason"))
            if self._is_run(run):
                self._reasons[run, site] = reason
            number = detail.get("round")
            where = run if number is None else f"{run}, round {number}"
            self.troubles.append(Trouble(moment, "failure", site, where, reason))
        elif kind == "refusal":
            self.troubles.append(Trouble(moment, "refusal", site, key, without_values(detail["message"])))
        elif kind == "late":
            text = f"came {detail['seconds']:.1f} s after the round was closed, and does not count"
            self.troubles.append(Trouble(moment, "late", site, key, text))


def _is_read(kind: str) -> bool:
    return kind in TROUBLE or kind == "model"
