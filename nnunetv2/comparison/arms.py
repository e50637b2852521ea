"""Define the arms of a comparison.

An arm says which data train a network, with which options of the project's own commands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from nnunetv2.utilities.json_files import JsonFileError, read_json

Training = Literal["alone", "pooled", "federated"]
Budget = Literal["site", "all"]
FEDERATED_TRAINER = "nnUNetTrainerAsymFedAvg"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train that is compared with the others."""

    name: str
    training: Training
    """`alone`: each site with its own cases; `pooled`: all cases in one place; `federated`: over a coordinator."""
    budget: Budget = "site"
    """Iterations of a pooled network: those of one site, or those of all sites together."""
    planning: Literal["ffe", "asym"] = "ffe"
    """How the sites of a federation plan."""
    networks: Literal["equal", "own"] = "equal"
    """Whether the sites of a federation that plan together have the same network, or each its own."""
    planning_options: tuple[str, ...] = ()
    """Further options of `nnUNetv2_plan_and_preprocess`."""
    planning_options_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The same at single sites: name of the dataset -> options."""
    coordinator_options: tuple[str, ...] = ()
    """Further options of `nnUNetv2_fed_coordinator`."""
    training_options: tuple[str, ...] = ()
    """Further options of `nnUNetv2_train`."""
    trainer: str = ""
    """Class of the trainer; empty: the default one, or that of Asymmetric Federated Averaging."""
    checkpoint: str = "checkpoint_final.pth"
    """Checkpoint that is tested."""

    @property
    def is_federated(self) -> bool:
        """Tell whether the sites train over a coordinator."""
        return self.training == "federated"

    @property
    def plan_group(self) -> str:
        """Name of the plans and preprocessed data that arms share which plan alike."""
        base: str = self.planning if self.is_federated else self.training
        base = base if self.networks == "equal" else self.networks
        words = [
            *self.planning_options,
            *(f"{site} {word}" for site, options in sorted(self.planning_options_of.items()) for word in options),
        ]
        return f"{base}_{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:8]}" if words else base

    @property
    def networks_options(self) -> tuple[str, ...]:
        """Return the options of every coordinator of this arm, also while its sites plan."""
        return () if self.networks == "equal" else ("--networks", self.networks)

    def planning_options_at(self, dataset: str) -> tuple[str, ...]:
        """Return the further options with which a site plans."""
        return (*self.planning_options, *self.planning_options_of.get(dataset, ()))

    def describe(self, num_sites: int) -> str:
        """Say in words how an arm trains."""
        if self.training == "alone":
            text = "each site trains with its own cases"
        elif self.training == "pooled":
            budget = "one site" if self.budget == "site" else f"all {num_sites} together"
            text = f"one network trains with the cases of all sites, for as many iterations as {budget}"
        else:
            plans = {"ffe": "plans from the pooled fingerprint", "asym": "each site's own plans"}[self.planning]
            own = "" if self.networks == "equal" else ", and networks of their own"
            text = f"the sites train together over a coordinator, with {plans}{own}"
        options = [" ".join((*self.planning_options, *self.coordinator_options, *self.training_options))]
        options += [f"{site}: {' '.join(words)}" for site, words in sorted(self.planning_options_of.items())]
        told = "; ".join(filter(None, options))
        return f"{text} ({told})" if told else text


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            Arm(name="alone", training="alone"),
            Arm(name="pooled", training="pooled"),
            Arm(name="pooled-all", training="pooled", budget="all"),
            Arm(name="ffe", training="federated"),
            Arm(name="ffe-uniform", training="federated", coordinator_options=("--weighting", "uniform")),
            Arm(name="asym", training="federated", planning="asym", coordinator_options=("--matching", "name")),
            Arm(
                name="asym-resolution",
                training="federated",
                planning="asym",
                coordinator_options=("--matching", "resolution"),
            ),
        )
    }
)
"""The arms that every comparison can name."""


def read_arms(file: Path) -> dict[str, Arm]:
    """Read further arms from a JSON file: name -> fields of `Arm`.

    Raises:
        JsonFileError: An arm has a field or a value that there is not; the message names both.
    """
    return {name: _arm_of(file, name, content) for name, content in read_json(file, refuse_duplicates=True).items()}


def _arm_of(file: Path, name: str, content: Any) -> Arm:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", name) or name in ARMS:
        raise JsonFileError(
            f"{file}: {name!r} cannot name an arm. Remedy: use up to 40 letters, digits and -_+. , and none of "
            f"{', '.join(ARMS)}"
        )
    if not isinstance(content, dict):
        raise JsonFileError(f"{file}: arm {name} must be given in braces, {{...}}")
    known = {one.name for one in fields(Arm)} - {"name"}
    if unknown := sorted(content.keys() - known):
        raise JsonFileError(f"{file}: arm {name} has no field {unknown[0]!r}. Fields: {', '.join(sorted(known))}")
    choices = {
        "training": ("alone", "pooled", "federated"),
        "budget": ("site", "all"),
        "planning": ("ffe", "asym"),
        "networks": ("equal", "own"),
    }
    values: dict[str, Any] = {}
    for field_name, value in content.items():
        if field_name in choices and value not in choices[field_name]:
            raise JsonFileError(
                f"{file}: arm {name}: {field_name} is {value!r}, not {' or '.join(choices[field_name])}"
            )
        if field_name == "planning_options_of":
            if not isinstance(value, dict):
                raise JsonFileError(f"{file}: arm {name}: {field_name} must be in braces: dataset -> list of texts")
            values[field_name] = {
                site: _words(file, name, f"{field_name}.{site}", words) for site, words in value.items()
            }
        elif field_name.endswith("_options"):
            values[field_name] = _words(file, name, field_name, value)
        elif isinstance(value, str):
            values[field_name] = value
        else:
            raise JsonFileError(f"{file}: arm {name}: {field_name} must be a text, it is {value!r}")
    if "training" not in values:
        raise JsonFileError(f"{file}: arm {name} needs the field 'training': alone, pooled or federated")
    arm = Arm(name=name, **values)
    if arm.networks == "own" and (not arm.is_federated or arm.planning != "ffe"):
        raise JsonFileError(
            f"{file}: arm {name}: networks of their own need training federated, and planning ffe: all plan from the "
            "one pooled fingerprint"
        )
    return arm


def _words(file: Path, name: str, field_name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise JsonFileError(
            f'{file}: arm {name}: {field_name} must be a list of texts, such as ["--weighting", "uniform"]'
        )
    return tuple(value)


def choose_arms(names: Sequence[str], further: Mapping[str, Arm]) -> tuple[Arm, ...]:
    """Return the arms with these names, in their order.

    Raises:
        ValueError: There is no such arm, or one is named twice.
    """
    known = {**ARMS, **further}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"there is no arm {unknown[0]!r}. Arms: {', '.join(known)}; others can be defined in a file, see "
            "--arms_file"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"an arm is named twice: {' '.join(names)}")
    return tuple(known[name] for name in names)
