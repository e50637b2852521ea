"""Documented import path of `nnunetv2.models.network_from_plans`."""

from nnunetv2.models.network_from_plans import find_network_class as find_network_class
from nnunetv2.models.network_from_plans import get_network_from_plans as get_network_from_plans
