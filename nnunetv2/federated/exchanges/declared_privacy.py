"""Describe the differential privacy that the sites of a run have declared.

Nobody but a site can know whether it is so: every text says who declares it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.federated.protocol.messages import PrivacyDeclaration

Declared = Mapping[str, PrivacyDeclaration | None]
"""Site -> its declaration; None for a training without differential privacy."""
WHO = "declared by the sites"


def describe_privacy(declared: Declared) -> str:
    """Describe the privacy of a run in one line; empty without any."""
    private = {site: one for site, one in declared.items() if one is not None}
    if not private:
        return ""
    groups: dict[str, list[str]] = {}
    for site, one in sorted(private.items()):
        groups.setdefault(_describe(one), []).append(site)
    without = sorted(declared.keys() - private.keys())
    parts = [f"{text} at {', '.join(sites)}" for text, sites in groups.items()]
    return f"differential privacy, {WHO}: " + "; ".join(
        [*parts, *([f"none at {', '.join(without)}"] if without else [])]
    )


def privacy_record(declared: Declared) -> dict[str, Any] | None:
    """Return the content of a model's privacy.json, or None without any privacy.

    The largest epsilon is on top; it is null where some site trained without, or the sites have protected scans and
    patients, which cannot be compared.
    """
    if not any(declared.values()):
        return None
    units = {one.unit if one is not None else None for one in declared.values()}
    known = [one for one in declared.values() if one is not None]
    is_comparable = len(units) == 1 and None not in units
    return {
        "declared_by": "the sites",
        "largest_epsilon": max(one.epsilon for one in known) if is_comparable else None,
        "largest_delta": max(one.delta for one in known) if is_comparable else None,
        "unit": units.pop() if is_comparable else None,
        "uncovered": sorted({what for one in known for what in one.uncovered}),
        "sites": {site: None if one is None else one.model_dump(mode="json") for site, one in sorted(declared.items())},
    }


def entry_of_site(declared: PrivacyDeclaration | None) -> dict[str, Any]:
    """Return the entry of a site's privacy in a round's record; empty without any."""
    return {} if declared is None else {"declared_privacy": declared.model_dump(mode="json")}


def _describe(one: PrivacyDeclaration) -> str:
    uncovered = f", {', '.join(one.uncovered)} not covered" if one.uncovered else ""
    return f"epsilon {one.epsilon:g} per {one.unit} (delta {one.delta:g}{uncovered})"
