"""Documented import path of `nnunetv2.models.weight_initialization`."""

from nnunetv2.models.weight_initialization import InitWeights_He as InitWeights_He
