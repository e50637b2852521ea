"""Documented import path of `nnunetv2.model_selection.accumulate_cv_results`."""

from nnunetv2.model_selection.accumulate_cv_results import accumulate_cv_results as accumulate_cv_results
from nnunetv2.model_selection.accumulate_cv_results import find_references as find_references
