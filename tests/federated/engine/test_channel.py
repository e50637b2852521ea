"""What must hold of an engine before a word is said through it."""

from __future__ import annotations

import pytest

from nnunetv2.federated.engine.channel import check_origins
from nnunetv2.federated.errors import FederationError


@pytest.mark.parametrize(
    ("is_secure", "allows_adhoc", "message"),
    [
        (False, False, "runs without certificates.*provision it"),
        (False, True, "runs without certificates"),
        (True, True, "ad-hoc connections.*remove allow_adhoc_conns from comm_config.json"),
    ],
)
def test_networks_in_which_origins_prove_nothing_are_refused(is_secure, allows_adhoc, message):
    with pytest.raises(FederationError, match=message):
        check_origins(is_secure=is_secure, allows_adhoc=allows_adhoc)


def test_a_provisioned_network_is_taken():
    check_origins(is_secure=True, allows_adhoc=False)
