"""Found a federation with settings that go together, or keep those of an existing one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from nnunetv2.federated.coordinator.members import Membership, create_federation, membership_of
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges.secure_sums import check_secure_settings
from nnunetv2.federated.privacy.cryptography_library import require_cryptography
from nnunetv2.federated.protocol.api import (
    FederationSettings,
    Secure,
    check_finetuning,
    check_floor,
    check_late_updates,
    check_quorum,
    check_rounds,
)

FIRST_SETTINGS = "first_settings"
"""Under this name, the store keeps the settings that a federation was created with."""

SETTINGS_OF_OPTIONS = {
    "sites": "sites",
    "epochs": "num_epochs",
    "iterations": "num_iterations_per_epoch",
    "val_iterations": "num_val_iterations_per_epoch",
    "matching": "matching",
    "weighting": "weighting",
    "precision": "precision",
    "exchange_every": "exchange_every",
    "quorum": "quorum",
    "deadline": "deadline_s",
    "late_updates": "late_updates",
    "validate_every": "validate_every",
    "min_sites": "min_sites",
    "secure": "secure",
    "geometry": "geometry",
    "networks": "networks",
    "labels": "labels",
    "proximal": "proximal",
    "keep_local": "keep_local",
    "finetune_epochs": "finetune_epochs",
    "initial_weights": "initial_weights",
}


def settle(
    store: Store,
    given: dict[str, object],
    *,
    found: Callable[[dict[str, object]], FederationSettings],
    membership: Membership,
    log: Callable[[str], None],
) -> FederationSettings:
    """Return the settings of the federation in a store.

    It is created if there is none.

    Args:
        given: The settings given at this start, by their names in FederationSettings.
        found: Makes the settings of a new federation from the given ones.

    Raises:
        FederationError: The given settings contradict the existing federation.
    """
    settings = store.load_settings()
    given = with_geometry(given, None if settings is None else settings.secure)
    if settings is None:
        settings = found(given)
        create_federation(store, settings, now=time.time(), membership=membership)
        store.save_meta(FIRST_SETTINGS, settings.model_dump(mode="json"))
    first = store.load_meta(FIRST_SETTINGS)
    check_unchanged(settings, FederationSettings.model_validate(first) if first else settings, given, store.folder)
    for line in describe_overruled(settings, given):
        log(line)
    if settings.secure is not None:
        require_cryptography("--secure")
    return settings


def check_membership(store: Store, wanted: Membership) -> None:
    """Raise FederationError if the sites of an existing federation become members in another way."""
    if store.load_settings() is None or membership_of(store) == wanted:
        return
    if wanted == "invitations":
        raise FederationError(
            f"{store.folder} holds a federation whose sites come through NVFlare: its jobs serve it, no "
            "nnUNetv2_fed_coordinator does. Choose another --folder"
        )
    raise FederationError(
        f"{store.folder} holds a federation whose sites have joined over HTTP: nnUNetv2_fed_coordinator serves it. "
        "Give the job another --federation"
    )


def with_geometry(given: dict[str, object], stored: Secure | None) -> dict[str, object]:
    """Return the given settings with `--geometry` as a part of `--secure`.

    Where it is not given, it stays as it is.

    Raises:
        FederationError: It is given without `--secure`.
    """
    given = dict(given)
    geometry = given.pop("geometry", None)
    if "secure" not in given:
        if geometry is not None:
            raise FederationError(
                f"--geometry {geometry} needs --secure: in clear, the coordinator sees spacings and shapes of each site"
            )
        return given
    secure = cast("Secure", given["secure"])
    told = geometry or ("list" if stored is None else stored.geometry)
    return {**given, "secure": secure.model_copy(update={"geometry": told})}


def with_implied(given: dict[str, object], *, k: object) -> dict[str, object]:
    """Return the given settings of a new federation, with those that follow from them.

    Args:
        k: From how many sites on sums are opened, if updates are masked; checked with all settings.
    """
    # FederationSettings says "name" where a stored federation says nothing, as early ones do.
    implied: dict[str, object] = {"matching": "resolution"}
    if k is not None:
        implied["min_sites"] = k
    return {**implied, **given}


def check_settings(settings: FederationSettings) -> None:
    """Raise FederationError if the settings contradict each other."""
    num_sites = len(settings.sites)
    if num_sites < 2:
        raise FederationError(f"a federation has at least two sites, got {', '.join(settings.sites) or 'none'}")
    if len({site.lower() for site in settings.sites}) != num_sites:
        raise FederationError("names of sites must differ in more than upper and lower case")
    check_secure_settings(settings)
    check_quorum(settings)
    check_floor(settings)
    check_late_updates(settings)
    check_rounds(settings)
    check_finetuning(settings)


def check_unchanged(
    stored: FederationSettings, first: FederationSettings, given: dict[str, object], folder: Path
) -> None:
    """Raise FederationError, naming the difference, if options contradict an existing federation.

    Args:
        first: The settings that it was created with. A service repeats them at each start; later
            changes by an operator stay.
    """
    options = {name: option for option, name in SETTINGS_OF_OPTIONS.items()}
    for name, value in given.items():
        present = getattr(stored, name)
        if value not in (present, getattr(first, name)):
            was, wanted = map(_in_words, (present, value))
            raise FederationError(
                f"{folder} holds a federation with --{options[name].replace('_', '-')} {was}, not "
                f"{wanted}: leave the option out, or start a new federation in another --folder"
            )


def describe_overruled(stored: FederationSettings, given: dict[str, object]) -> Iterator[str]:
    """Yield a line for every option of the first start that is repeated in vain."""
    options = {name: option for option, name in SETTINGS_OF_OPTIONS.items()}
    for name, value in given.items():
        present = getattr(stored, name)
        if value != present:
            was, wanted = map(_in_words, (present, value))
            yield (
                f"--{options[name].replace('_', '-')} {wanted} is that of the first start and has no effect: an "
                f"operator has changed it to {was} since"
            )


def _in_words(value: object) -> object:
    """Return a setting as it is typed."""
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value.k} --geometry {value.geometry}" if isinstance(value, Secure) else value
