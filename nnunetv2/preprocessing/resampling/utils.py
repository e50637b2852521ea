"""Documented import path of `nnunetv2.plans.plug_ins`."""

from nnunetv2.plans.plug_ins import recursive_find_resampling_fn_by_name as recursive_find_resampling_fn_by_name
