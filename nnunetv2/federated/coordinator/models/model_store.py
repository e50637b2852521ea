"""Store the models of finished runs, and find them for members."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from nnunetv2.federated.coordinator.models.model_folder import keep_models, keep_models_of_networks, name_of_zip
from nnunetv2.federated.coordinator.state import FederationState, Locks
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.documents import Agreement
from nnunetv2.federated.exchanges.network_groups import foresee_networks
from nnunetv2.federated.exchanges.outlook import Outlook, foresee_model
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.keys import RegistrationKey
from nnunetv2.utilities.atomic_write import flush_to_disk

FOLDER = "models"
_RECORDS = 100
"""Of rounds, read at a time."""


@dataclass(frozen=True)
class KeptModel:
    """A zip file that a member may download."""

    path: Path
    digest: str


class ModelStore:
    """The models of all runs of a federation. Safe for use by several threads."""

    def __init__(self, state: FederationState) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._digesting = Locks()
        self._outlooks: dict[str, tuple[Agreement, Outlook]] = {}
        """Run -> its agreement, and the outlook that follows from it."""

    def keep(self, run: str) -> None:
        """Write the model of a run that is over, once for each content.

        Again if its zip file was lost or cut off.
        """
        state, rounds = self._state, self._made_of(run)
        known = self._outcome(run, rounds)
        if known is not None and self._is_kept(run, known):
            return
        final = rounds["final"]
        assert final is not None, run  # a run of no closed round has no model
        folder = state.store.folder / FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        keep = (
            keep_models
            if state.settings.networks == "equal"
            else partial(keep_models_of_networks, rounds_until=lambda number: self._rounds_until(run, number))
        )
        text = keep(run, folder, final=final, best=rounds["best"], archive=state.documents)
        # The log tells only of files that are on the disk, names included.
        for written in (state.store.folder, folder, *(path for path in folder.rglob("*") if path.is_dir())):
            flush_to_disk(written)
        state.record("model", None, run, {"outcome": text, "rounds": rounds})
        state.log(f"run {run} is over: {text}")

    def _is_kept(self, run: str, outcome: str) -> bool:
        """Tell whether the model that a line of the log tells of is on the disk; also if it tells of none."""
        try:
            path = self._state.store.folder / FOLDER / name_of_zip(outcome)
        except RefusedError:
            return True
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (FileNotFoundError, zipfile.BadZipFile):
            return False
        try:
            _, registration = next(self._state.documents.each_registration(run))
        except (FederationError, OSError):
            return True  # without it no model can be written either
        end = f"/fold_{registration.fold}/checkpoint_final.pth"  # runs of several folds share a file
        return any(name.endswith(end) for name in names)

    def _rounds_until(self, run: str, number: int) -> set[tuple[frozenset[str], int]]:
        """Return, of the rounds of a run up to one, the sites, and the fewest that average a tensor."""
        found = set()
        for first in range(0, number + 1, _RECORDS):  # those of a long run are large
            for record in self._state.store.load_rounds(run, first, min(_RECORDS, number + 1 - first)):
                least = record["settings"].get("min_sites", api.LEAST_SITES)
                found.add((frozenset(record["sites"]), least))
        return found

    def outlook(self, run: str) -> Outlook | None:
        """Return the outlook of a run's averages.

        None before its sites have registered. Computed once.
        """
        if not self._state.registry.is_closed(RegistrationKey(run)):
            return None
        documents = self._state.documents
        with self._lock:  # when registration closes all sites ask at once, and one answer does for all
            agreement = documents.agreement(run)  # another one when a site is admitted, or the run begins anew
            known = self._outlooks.get(run)
            if known is None or known[0] is not agreement:
                foresee = foresee_model if self._state.settings.networks == "equal" else foresee_networks
                known = agreement, foresee(documents.each_registration(run), agreement.match)
                self._outlooks[run] = known
            return known[1]

    def outlooks(self, runs: Iterable[str]) -> api.Outlooks:
        """Foresee the averages of these runs, as far as they are known."""
        found = {run: self.outlook(run) for run in runs}
        return api.Outlooks(
            runs=tuple(
                api.RunOutlook(
                    run=run,
                    trainer=one.trainer,
                    obstacle=one.obstacle[:8000],
                    networks=one.networks,
                    coverage=dict(one.coverage),
                )
                for run, one in found.items()
                if one is not None
            )
        )

    def fetch(self, run: str, *, member: str) -> KeptModel:
        """Return the model of a run for a member, and log that it fetches it.

        Raises as `find`.
        """
        path = self.find(run)
        with self._digesting[str(path)]:  # when a run is over all sites ask at once, and one reading does for all
            model = KeptModel(path, _digest(path, *_identity(path)))
        self._record_fetch(run, member, model.digest)
        return model

    def find(self, run: str) -> Path:
        """Return where the model of a run is.

        Raises:
            RefusedError: The run goes on, or there is no model of it.
            OSError: It is not written yet.
        """
        registry = self._state.registry
        if not registry.has_run(run):
            raise RefusedError(
                f"there is no run {run[:200]!r}", f"Runs: {', '.join(registry.runs()) or 'none'}.", code="unknown_run"
            )
        state = registry.run_state(run)
        if not state.closed:
            total = "" if state.num_rounds is None else f" of {state.num_rounds}"
            raise RefusedError(
                f"run {run} is not over: {state.rounds_closed}{total} rounds are closed",
                "There is a model when all are, or when the operator has stopped the run.",
                code="no_model",
            )
        if not state.rounds_closed:
            raise RefusedError(
                f"run {run} was stopped before its first round was closed: there is no model of it", code="no_model"
            )
        outcome = self._outcome(run, self._made_of(run))
        if outcome is None:
            raise OSError(f"the model of run {run} is not written yet")
        path = self._state.store.folder / FOLDER / name_of_zip(outcome)
        if not path.is_file():
            raise RefusedError(
                f"the model of run {run} is not in the coordinator's folder any more",
                "Ask the operator.",
                code="no_model",
            )
        return path

    def _made_of(self, run: str) -> dict[str, int | None]:
        """Return the rounds whose aggregates are the model's checkpoints."""
        state = self._state
        return {"final": state.registry.latest_number(run), "best": state.documents.best_round(run)}

    def _outcome(self, run: str, rounds: Mapping[str, int | None]) -> str | None:
        """Return where the log says that a model is, or why none; None: not yet."""
        return next(
            (
                event.detail["outcome"]
                for event in self._state.store.load_events("model")
                if event.key == run and event.detail.get("rounds") == rounds
            ),
            None,
        )

    def _record_fetch(self, run: str, member: str, digest: str) -> None:
        """Log once who has got which model: a download that goes on asks again."""
        state, detail = self._state, {"digest": digest}
        with state.locks[run]:
            if any(
                (event.site, event.key, dict(event.detail)) == (member, run, detail)
                for event in state.store.load_events("fetch")
            ):
                return
            state.record("fetch", member, run, detail)
            state.log(f"run {run}: {member} fetches the model")


def _identity(path: Path) -> tuple[int, int, int]:
    """Return a tuple that changes whenever a file is written anew."""
    status: os.stat_result = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(path: Path, inode: int, size: int, modified_ns: int) -> str:
    """Return the SHA-256 of a file, which is read once however many ask for it."""
    return file_digest(path)
