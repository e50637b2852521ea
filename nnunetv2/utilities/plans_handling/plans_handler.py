"""Documented import path of `nnunetv2.plans.plans_manager`."""

from nnunetv2.plans.plans_manager import ConfigurationManager as ConfigurationManager
from nnunetv2.plans.plans_manager import PlansManager as PlansManager
from nnunetv2.plans.plans_manager import resolve_inheritance as resolve_inheritance
