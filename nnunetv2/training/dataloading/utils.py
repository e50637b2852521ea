"""Documented import path of `nnunetv2.preprocessed_data.unpacking`."""

from nnunetv2.preprocessed_data.unpacking import _convert_to_npy as _convert_to_npy
from nnunetv2.preprocessed_data.unpacking import unpack_dataset as unpack_dataset
