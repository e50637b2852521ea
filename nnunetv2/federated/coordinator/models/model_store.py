"""Keep the model of every run that is over, and find it for those who fetch it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.federated.coordinator.models.model_folder import keep_models, name_of_zip
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.outlook import Outlook, foresee_model
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.keys import RegistrationKey

if TYPE_CHECKING:
    from nnunetv2.federated.coordinator.service import Coordinator

FOLDER = "models"


@dataclass(frozen=True)
class KeptModel:
    """A zip file that a member may download."""

    path: Path
    digest: str


def keep(coordinator: Coordinator, run: str) -> None:
    """Write the model of a run that is over, once for what it is made of."""
    rounds = _made_of(coordinator, run)
    if _outcome(coordinator, run, rounds) is not None:
        return
    folder = coordinator.store.folder / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    text = keep_models(run, folder, final=rounds["final"], best=rounds["best"], archive=coordinator.archive)
    coordinator.store.add_event(Event(coordinator.clock(), "model", None, run, {"outcome": text, "rounds": rounds}))
    coordinator.announce(f"run {run} is over: {text}")


def outlook(coordinator: Coordinator, run: str) -> Outlook | None:
    """Return what will become of a run's averages; None before its sites have registered. Computed once."""
    if not coordinator.book.is_closed(RegistrationKey(run)):
        return None
    agreement = coordinator.archive.agreement(run)  # another one when a site is admitted, or the run begins anew
    known = coordinator.outlooks.get(run)
    if known is None or known[0] is not agreement:
        known = agreement, foresee_model(coordinator.archive.each_registration(run), agreement.match)
        coordinator.outlooks[run] = known
    return known[1]


def outlooks(coordinator: Coordinator, runs: Iterable[str]) -> api.Outlooks:
    """Return what will become of the averages of these runs, as far as it is known."""
    found = {run: outlook(coordinator, run) for run in runs}
    return api.Outlooks(
        runs=tuple(
            api.RunOutlook(run=run, trainer=one.trainer, obstacle=one.obstacle[:8000])
            for run, one in found.items()
            if one is not None
        )
    )


def fetch(coordinator: Coordinator, run: str, *, member: str) -> KeptModel:
    """Return the model of a run for a member, and note in the log that it fetches it. Raises as `find`."""
    path = find(coordinator, run)
    model = KeptModel(path, _digest(path, *_identity(path)))
    _note(coordinator, run, member, model.digest)
    return model


def find(coordinator: Coordinator, run: str) -> Path:
    """Return where the model of a run is.

    Raises:
        RefusedError: The run goes on, or there is no model of it.
        OSError: It is not written yet.
    """
    if run not in coordinator.book.runs():
        raise RefusedError(
            f"there is no run {run[:200]!r}",
            f"Runs: {', '.join(coordinator.book.runs()) or 'none'}.",
            code="unknown_run",
        )
    state = coordinator.run_state(run)
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
    outcome = _outcome(coordinator, run, _made_of(coordinator, run))
    if outcome is None:
        raise OSError(f"the model of run {run} is not written yet")
    path = coordinator.store.folder / FOLDER / name_of_zip(outcome)
    if not path.is_file():
        raise RefusedError(
            f"the model of run {run} is not in the coordinator's folder any more", "Ask the operator.", code="no_model"
        )
    return path


def _made_of(coordinator: Coordinator, run: str) -> dict[str, int | None]:
    """Return the rounds whose aggregates are the model's checkpoints."""
    return {"final": coordinator.book.latest_number(run), "best": coordinator.archive.best_round(run)}


def _outcome(coordinator: Coordinator, run: str, rounds: Mapping[str, int | None]) -> str | None:
    """Return where the log says that the model of these rounds is, or why there is none; None: nothing was done yet."""
    return next(
        (
            event.detail["outcome"]
            for event in coordinator.store.load_events("model")
            if event.key == run and event.detail.get("rounds") == rounds
        ),
        None,
    )


def _note(coordinator: Coordinator, run: str, member: str, digest: str) -> None:
    """Log once who has got which model: a download that goes on asks again."""
    detail = {"digest": digest}
    with coordinator.locks[run]:
        if not any(
            (event.site, event.key, dict(event.detail)) == (member, run, detail)
            for event in coordinator.store.load_events("fetch")
        ):
            coordinator.store.add_event(Event(coordinator.clock(), "fetch", member, run, detail))
            coordinator.announce(f"run {run}: {member} fetches the model")


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what changes whenever a file is written anew."""
    status: os.stat_result = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(path: Path, inode: int, size: int, modified_ns: int) -> str:
    """Return the SHA-256 of a file, which is read once however many ask for it."""
    return file_digest(path)
