"""Keep one site from filling the coordinator's disk with unwanted documents.

A site's documents in a round are bounded by the agreement of its run, and by the rounds that are open. Runs and plans,
however, have the names that sites give them: their number is bounded here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.registry import ExchangeRegistry
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.protocol.keys import Key, ShapeSumKey, ShapeSumSurvivorsKey, ShapeSumUploadKey

MAX_OPEN = 200
"""Exchanges with names of their own (runs that are not registered for by all, plans) that one site may have open."""
MAX_OPEN_BYTES = 1 << 30
"""Bytes that the documents of one site in them may have."""
RESERVED_BYTES = 256 << 20
"""Bytes that uploads leave free on the disk: for aggregates, the database and its journal."""


def has_name_of_its_own(key: Key) -> bool:
    """Tell whether sites choose how many exchanges of this kind there are."""
    names_plans = isinstance(key, ShapeSumKey | ShapeSumSurvivorsKey | ShapeSumUploadKey)
    return names_plans or not step_of(key).policy.first_stays


def check_room(key: Key, site: str, size: int, *, registry: ExchangeRegistry, folder: Path) -> None:
    """Raise RefusedError if a site's quota or the disk has no room left."""
    if has_name_of_its_own(key):
        others = [
            one.contributions[site].size
            for one in registry.open_exchanges()
            if one.key != key and has_name_of_its_own(one.key) and site in one.contributions
        ]
        if len(others) >= MAX_OPEN:
            raise RefusedError(
                f"site {site} takes part in {len(others)} gatherings that are still open, at most "
                f"{MAX_OPEN} are allowed",
                "Ask the coordinating site to reset runs that nobody else takes part in: nnUNetv2_fed_admin reset RUN.",
                code="too_many_gatherings",
            )
        if sum(others) + size > MAX_OPEN_BYTES:
            raise RefusedError(
                f"the documents of site {site} in gatherings that are still open have more than "
                f"{MAX_OPEN_BYTES >> 20} MiB",
                "Ask the coordinating site to reset runs that nobody else takes part in: nnUNetv2_fed_admin reset RUN.",
                code="too_many_bytes",
            )
    free = shutil.disk_usage(folder).free
    if free < size + RESERVED_BYTES:
        raise RefusedError(
            f"the coordinator's disk is full: {free >> 20} MiB are free",
            "The coordinating site has to make room; nothing is lost.",
            code="disk_full",
        )
