"""Compare the options of a site with the settings of its federation."""

from __future__ import annotations

from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.training.options import OptionError, TrainingOptions, option_of

FIXED = {
    "epochs": "num_epochs",
    "iterations": "num_iterations_per_epoch",
    "val_iterations": "num_val_iterations_per_epoch",
}
"""Options that the operator may fix -> the setting."""


def check_against_settings(options: TrainingOptions, settings: FederationSettings) -> None:
    """Raise OptionError if an option of this site contradicts a setting of its federation."""
    for name, setting in FIXED.items():
        asked, fixed = getattr(options, name), getattr(settings, setting)
        if asked is not None and fixed not in (None, asked):
            raise OptionError(
                f"{option_of(name)} {asked} contradicts federation {settings.federation}, whose sites all train with "
                f"{fixed}: leave it out"
            )
