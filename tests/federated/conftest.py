"""Let tests of a site's routes run twice: over HTTP to the coordinator, and through gateways of a fake engine."""

from __future__ import annotations

import fake_federation
import pytest

THROUGH_GATEWAYS = (
    "coordinator/test_app.py",
    "coordinator/test_failure_reports.py",
    "coordinator/test_identities.py",
    "coordinator/test_run_control.py",
    "site/test_participant.py",
    "site/transports/test_http.py",
    "system/test_late_planning.py",
    "system/test_late_updates.py",
    "system/test_masked_dropouts.py",
    "system/test_masked_rounds.py",
    "system/test_run_names.py",
    "system/test_secure_planning.py",
)
"""Files of tests that ask what sites ask."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_for_both = metafunc.definition.get_closest_marker("http_only") is None
    if is_for_both and metafunc.module.__file__.endswith(THROUGH_GATEWAYS):
        metafunc.parametrize("way", ["http", "gateway"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def way(request: pytest.FixtureRequest):
    """Let `served` put gateways in front of its coordinators, or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_federation, "THROUGH_GATEWAYS", getattr(request, "param", "http") == "gateway")
        yield
