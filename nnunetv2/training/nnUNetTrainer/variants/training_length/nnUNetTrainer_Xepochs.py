"""Trainers of other lengths: nnUNetTrainer_1epoch, nnUNetTrainer_5epochs and so on."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import derive_trainer

LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000)

for _length in LENGTHS:
    _words = f"{_length} epoch" if _length == 1 else f"{_length} epochs"
    _name = f"nnUNetTrainer_{_words.replace(' ', '')}"
    globals()[_name] = derive_trainer(nnUNetTrainer, _name, f"Train for {_words}.", __name__, num_epochs=_length)
