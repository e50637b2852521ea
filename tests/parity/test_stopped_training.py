"""The reference release predicts with trainings that were stopped early, and finds them by their names."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch
from tiny_dataset import NAME, SHAPE, make_tiny_dataset

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.run.run_training import run_training
from nnunetv2.run.stop_training import stop_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.options import TrainingOptions
from nnunetv2.utilities.file_path_utilities import get_output_folder

OPTIONS = {"epochs": 50, "iterations": 4, "val_iterations": 1, "class_weights": {"core": 3.0}, "seed": 1}
STOPPED_IN_EPOCHS = (0, 2)

PREDICT = """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder
for trainer in value["trainers"]:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(get_output_folder(998, trainer), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(value["images"], value["output"] + "/" + trainer)
"""


def test_the_reference_predicts_with_a_training_stopped_at_any_epoch(roots, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    (roots["nnUNet_raw"] / NAME).mkdir()
    whole = nnUNetTrainer.on_train_epoch_start
    trainers = {epoch: f"nnUNetTrainer-stopped_{epoch}" for epoch in STOPPED_IN_EPOCHS}
    for epoch, trainer in trainers.items():
        fold = roots["nnUNet_results"] / NAME / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"

        def begin(self, epoch=epoch, fold=fold):
            whole(self)
            if self.current_epoch == epoch:
                stop_training(fold)

        monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", begin)
        run_training(998, "3d_fullres", 0, trainer, device=torch.device("cpu"), options=TrainingOptions(**OPTIONS))
        assert load_checkpoint_file(fold / "checkpoint_final.pth")["current_epoch"] == epoch + 1

    images = tmp_path / "images"
    images.mkdir()
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(image), str(images / "new_0000.nii.gz"))
    for trainer in trainers.values():
        (tmp_path / "theirs" / trainer).mkdir(parents=True)
    value = {"trainers": list(trainers.values()), "images": str(images), "output": str(tmp_path / "theirs")}
    reference.run(PREDICT, value)
    for trainer in trainers.values():
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
        predictor.initialize_from_trained_model_folder(get_output_folder(998, trainer), (0,), "checkpoint_final.pth")
        predictor.predict_from_files_sequential(str(images), str(tmp_path / "ours" / trainer))
        theirs, ours = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / who / trainer / "new.nii.gz")))
            for who in ("theirs", "ours")
        )
        assert theirs.shape == SHAPE and np.mean(theirs == ours) > 0.99
