"""Data loaders put together by hand: cases with weights, a loader and a dataset class of one's own."""

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


class CountingDataset(nnUNetDatasetBlosc2):
    loaded = []

    def load_case(self, identifier):
        self.loaded.append(identifier)
        return super().load_case(identifier)


class FirstCaseLoader(nnUNetDataLoader):
    def get_do_oversample(self, sample_idx: int) -> bool:
        return sample_idx == 0

    def get_indices(self):
        return list(super().get_indices())

    def generate_train_batch(self):
        batch = super().generate_train_batch()
        batch["weight"] = np.ones(len(batch["keys"]))
        return batch


class nnUNetTrainerWeightedCases(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def get_tr_and_val_datasets(self):
        tr_keys, val_keys = self.do_split()
        return tuple(
            CountingDataset(
                self.preprocessed_dataset_folder,
                keys,
                folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
            )
            for keys in (tr_keys, val_keys)
        )

    def get_dataloaders(self):
        patch_size = self.configuration_manager.patch_size
        deep_supervision_scales = self._get_deep_supervision_scales()
        (rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size, mirror_axes) = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        tr_transforms = self.get_training_transforms(
            patch_size,
            rotation_for_DA,
            deep_supervision_scales,
            mirror_axes,
            do_dummy_2d_data_aug,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            is_cascaded=self.is_cascaded,
            foreground_labels=self.label_manager.foreground_labels,
            regions=self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            ignore_label=self.label_manager.ignore_label,
        )
        val_transforms = self.get_validation_transforms(
            deep_supervision_scales,
            is_cascaded=self.is_cascaded,
            foreground_labels=self.label_manager.foreground_labels,
            regions=self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            ignore_label=self.label_manager.ignore_label,
        )
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        weights = np.arange(1, len(dataset_tr.identifiers) + 1) / np.arange(1, len(dataset_tr.identifiers) + 1).sum()
        options = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "pad_sides": None,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        dl_tr = FirstCaseLoader(
            dataset_tr,
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            sampling_probabilities=weights,
            transforms=tr_transforms,
            **options,
        )
        dl_val = nnUNetDataLoader(
            dataset_val,
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            sampling_probabilities=None,
            transforms=val_transforms,
            **options,
        )
        workers = get_allowed_n_proc_DA()
        if workers == 0:
            mt_gen_train, mt_gen_val = SingleThreadedAugmenter(dl_tr, None), SingleThreadedAugmenter(dl_val, None)
        else:
            mt_gen_train, mt_gen_val = [
                NonDetMultiThreadedAugmenter(
                    data_loader=loader,
                    transform=None,
                    num_processes=workers,
                    num_cached=4,
                    seeds=None,
                    pin_memory=False,
                    wait_time=0.002,
                )
                for loader in (dl_tr, dl_val)
            ]
        _ = next(mt_gen_train)
        _ = next(mt_gen_val)
        return mt_gen_train, mt_gen_val
