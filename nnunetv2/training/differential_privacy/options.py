"""The options of a training with differential privacy, and refused ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LARGEST_LOT = 64
"""Of the default: a quarter of the patients, but no more."""
UNCOVERED = ("plans",)
"""Parts of a training that may stay outside of epsilon, if a site says so."""

WHY_NOT = {
    "site": (
        "differential privacy of whole sites is not offered: at epsilon 8 and 100 rounds, the noise is 5,810 times as "
        "long as the mean of five sites' updates, and 454 times with 64 sites (network of 31 million parameters). "
        "--dp patient protects each patient of this site"
    ),
    "fingerprint": (
        "fingerprints with differential privacy are not offered: at epsilon 4, the noise moves the 99.5th percentile "
        "of CT intensities by 37 standard deviations with 200 cases, and by 12 with 1,000. Take plans of other "
        "patients (nnUNetv2_move_plans_between_datasets), or leave them uncovered with --dp_uncovered plans"
    ),
}
"""Options that users may ask for, and the figures that speak against them."""


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """The wishes of a user; None: the default, or as the training began."""

    epsilon: float | None = None
    """To which patients are brought at most, by all trainings of the dataset together. Default: the budget."""
    sigma: float | None = None
    """Noise multiplier. Default: the smallest that keeps to epsilon."""
    lot: int | None = None
    """Patients per step, on average. Default: a quarter of them, at most 64."""
    clip: float | None = None
    """Largest L2 norm of one patient's gradient. Default: 1."""
    patches: int | None = None
    """Drawn from each patient of a lot. Default: 1."""
    uncovered: tuple[str, ...] = ()
    """Parts that stay outside of epsilon: "plans" that were made from the same patients."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: A number is not finite and above 0.
        """
        for name in ("epsilon", "sigma", "lot", "clip", "patches"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--dp_{name} must be finite and above 0, not {value}")
        unknown = sorted(set(self.uncovered) - set(UNCOVERED))
        if unknown:
            raise ValueError(f"--dp_uncovered {unknown[0]}: only {', '.join(UNCOVERED)} can stay uncovered")

    def otherwise(self, earlier: PrivacyOptions) -> PrivacyOptions:
        """Return these options, with those of an earlier start where nothing is asked for.

        Noise is found anew where another epsilon is asked for.
        """
        kept = {name: value for name, value in asdict(earlier).items() if not getattr(self, name)}
        if self.epsilon is not None and self.sigma is None:
            kept.pop("sigma", None)
        return PrivacyOptions(**{**asdict(self), **kept})

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> PrivacyOptions:
        """Return the options that `dataclasses.asdict` has made plain data of."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**{**known, "uncovered": tuple(known.get("uncovered") or ())})


def add_privacy_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of trainings with differential privacy to a parser; `options_of` reads them."""
    group = parser.add_argument_group("differential privacy, for trainers such as nnUNetTrainerDPAsymFedAvg")
    group.add_argument(
        "--dp",
        dest="dp_level",
        choices=("patient", *WHY_NOT),
        help="Whom to protect. Only patient is offered; for the others, the reason why not is printed.",
    )
    group.add_argument(
        "--dp_epsilon",
        type=float,
        metavar="EPSILON",
        help="Largest epsilon of a patient after this training, earlier ones of the dataset included. Default: the "
        "budget (nnUNetv2_fed_privacy)",
    )
    group.add_argument(
        "--dp_sigma", type=float, metavar="SIGMA", help="Noise multiplier. Default: the smallest that keeps to epsilon"
    )
    group.add_argument(
        "--dp_lot",
        type=int,
        metavar="PATIENTS",
        help=f"Patients per step, on average. Default: a quarter of them, at most {LARGEST_LOT}",
    )
    group.add_argument("--dp_clip", type=float, metavar="NORM", help="Largest norm of a patient's gradient. Default: 1")
    group.add_argument("--dp_patches", type=int, metavar="NUMBER", help="Patches per patient and step. Default: 1")
    group.add_argument(
        "--dp_uncovered",
        action="append",
        choices=UNCOVERED,
        help="Train with plans that were made from the same patients, which epsilon does not cover; every record says "
        "so.",
    )


def options_of(arguments: argparse.Namespace) -> PrivacyOptions | None:
    """Return the options of a command line; None if none was given.

    Raises:
        ValueError: Something was asked for that is not offered, or makes no sense.
    """
    if arguments.dp_level in WHY_NOT:
        raise ValueError(WHY_NOT[arguments.dp_level])
    options = PrivacyOptions(
        **{name: getattr(arguments, f"dp_{name}") for name in ("epsilon", "sigma", "lot", "clip", "patches")},
        uncovered=tuple(dict.fromkeys(arguments.dp_uncovered or ())),
    )
    return None if options == PrivacyOptions() and arguments.dp_level is None else options
