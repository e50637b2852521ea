"""Documented import path of `nnunetv2.models.network_presets`."""

from nnunetv2.models.network_presets import PRESETS as PRESETS
from nnunetv2.models.network_presets import PRIMUS as PRIMUS
from nnunetv2.models.network_presets import get_network_from_name as get_network_from_name
