"""A site that masks trains by the settings to which its masks are bound."""

import pytest

from nnunetv2.federated.errors import WireError
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.messages import Match
from nnunetv2.training.nnUNetTrainer.variants.federated.settings_of_run import FIXED, check_against_match

VALUES = {"num_epochs": 10, "num_iterations_per_epoch": 250, "num_val_iterations_per_epoch": 50}
SETTINGS = FederationSettings(federation="test", sites=("A", "B", "C"), **VALUES)
MATCH = Match(
    rule="name",
    weighting="cases",
    weights={"A": 1.0},
    shared={"w": {"A": "w"}},
    initial_owner={"w": "A"},
    coverage={"A": (1, 1)},
    **VALUES,
)


def test_equal_settings_are_accepted():
    check_against_match(MATCH, SETTINGS)


@pytest.mark.parametrize("setting", FIXED.values())
def test_other_settings_than_those_of_the_run_are_refused(setting):
    with pytest.raises(WireError, match=f"says {setting} 1 in its settings and {VALUES[setting]} for this run"):
        check_against_match(MATCH, SETTINGS.model_copy(update={setting: 1}))
