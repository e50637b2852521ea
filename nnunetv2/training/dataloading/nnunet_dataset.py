"""Documented import path of `nnunetv2.preprocessed_data.datasets`."""

from nnunetv2.preprocessed_data.datasets import comp_blosc2_params as comp_blosc2_params
from nnunetv2.preprocessed_data.datasets import file_ending_dataset_mapping as file_ending_dataset_mapping
from nnunetv2.preprocessed_data.datasets import infer_dataset_class as infer_dataset_class
from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset as nnUNetBaseDataset
from nnunetv2.preprocessed_data.datasets import nnUNetDatasetBlosc2 as nnUNetDatasetBlosc2
from nnunetv2.preprocessed_data.datasets import nnUNetDatasetNumpy as nnUNetDatasetNumpy
