"""List the kinds of classes named by plans and checkpoints.

Base classes are looked up by name, since their packages build on this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class PlugIn:
    """A kind of class that files name."""

    key: str
    """Where they name it."""
    package: str
    """Below nnunetv2; searched with all packages in it."""
    base_module: str
    """Below `package`."""
    base_name: str

    def base_class(self) -> type:
        """Import the class that all of this kind derive from."""
        return getattr(import_module(f"nnunetv2.{self.package}.{self.base_module}"), self.base_name)


TRAINER = PlugIn("trainer_name", "training.nnUNetTrainer", "nnUNetTrainer", "nnUNetTrainer")
PLANNER = PlugIn(
    "experiment_planner_used",
    "experiment_planning",
    "experiment_planners.default_experiment_planner",
    "ExperimentPlanner",
)
PREPROCESSOR = PlugIn("preprocessor_name", "preprocessing", "preprocessors.default_preprocessor", "DefaultPreprocessor")
