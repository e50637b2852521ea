"""Trainers of other lengths without mirroring: nnUNetTrainer_250epochs_NoMirroring and so on."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.settings import derive_trainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

LENGTHS = (250, 2000, 4000, 8000)

for _length in LENGTHS:
    _name = f"nnUNetTrainer_{_length}epochs_NoMirroring"
    globals()[_name] = derive_trainer(
        nnUNetTrainerNoMirroring, _name, f"Train for {_length} epochs, never mirroring.", __name__, num_epochs=_length
    )
