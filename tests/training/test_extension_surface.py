"""The contract with trainers of third parties, point by point."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from extension_surface import ATTRIBUTES, HOOKS, LOGGER_MEMBERS, MODULES, STATIC_HOOKS
from tiny_dataset import make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CPU = torch.device("cpu")


@pytest.fixture
def trainer(roots, monkeypatch) -> nnUNetTrainer:
    """A trainer whose dataset is ready."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)
    plans = make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3)
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, make_dataset_json(), CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    return trainer


@pytest.mark.parametrize("module", MODULES)
def test_names_are_imported_from_where_they_always_were(module):
    found = importlib.import_module(module)
    assert [name for name in MODULES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("name", HOOKS.split())
def test_a_hook_is_there_and_is_called_by_its_class_where_it_is_static(name):
    assert callable(getattr(nnUNetTrainer, name))
    assert isinstance(inspect.getattr_static(nnUNetTrainer, name), staticmethod) == (name in STATIC_HOOKS)


def test_attributes_are_there_after_construction():
    trainer = nnUNetTrainer(make_plans(), "3d_fullres", 0, make_dataset_json(), CPU)
    assert [name for name in ATTRIBUTES.split() if not hasattr(trainer, name)] == []
    assert [name for name in LOGGER_MEMBERS.split() if not hasattr(trainer.logger, name)] == []
    assert not hasattr(trainer, "batch_size")  # known after initialize()


def test_the_constructor_makes_the_folder_and_lines_can_be_logged_at_once(trainer):
    trainer.print_to_log_file("first", 2, add_timestamp=False, also_print_to_console=False)
    assert Path(trainer.output_folder).is_dir()
    assert Path(trainer.log_file).read_text().endswith("first 2 \n")


def test_a_configuration_is_one_object_that_may_be_edited(trainer):
    assert trainer.plans_manager.get_configuration("3d_fullres") is trainer.configuration_manager
    trainer.configuration_manager.configuration["patch_size"] = [16, 16, 16]
    trainer.configuration_manager.configuration["batch_size"] = 3
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    assert next(loader)["data"].shape == (3, 1, 16, 16, 16) and trainer.batch_size == 3


def test_steps_receive_batches_on_the_cpu_and_epochs_what_steps_return(trainer):
    seen = []
    step = trainer.train_step
    epoch_end = trainer.on_train_epoch_end

    def train_step(batch):
        assert batch["data"].device == CPU and isinstance(batch["target"], list) and len(batch["keys"]) == 2
        return {**step(batch), "count": 1, "array": np.zeros(3), "names": ["a", "b"]}

    def on_train_epoch_end(outputs):
        seen.append(outputs)
        epoch_end(outputs)

    trainer.train_step, trainer.on_train_epoch_end = train_step, on_train_epoch_end
    trainer.run_training()
    assert [set(output) for output in seen[0]] == [{"loss", "count", "array", "names"}] * 2


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_the_loss_receives_lists_exactly_with_deep_supervision(trainer, deep_supervision):
    trainer.enable_deep_supervision = deep_supervision
    trainer.initialize()
    kinds = []
    trainer.loss = lambda output, target: (
        kinds.append((type(output), type(target))) or (output[0] if deep_supervision else output).sum()
    )
    loader, _ = trainer.get_dataloaders()
    trainer.train_step(next(loader))
    assert all(issubclass(kind, (list, tuple)) == deep_supervision for kind in kinds[0])


def test_any_iterators_can_be_data_loaders(trainer):
    patch = trainer.configuration_manager.patch_size

    def batches():
        while True:
            yield {
                "data": torch.zeros(2, 1, *patch),
                "keys": ["x", "y"],
                "target": [torch.zeros(2, 1, *patch), torch.zeros(2, 1, *[length // 2 for length in patch])],
            }

    trainer.get_dataloaders = lambda: (batches(), batches())
    trainer.run_training()
    assert trainer.current_epoch == 1


def test_checkpoints_are_given_as_text_or_as_dict_and_may_hold_more(trainer):
    trainer.run_training()
    path = f"{trainer.output_folder}/checkpoint_final.pth"
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    for given in (path, {**checkpoint, "mine": 1}):
        other = nnUNetTrainer(trainer.plans_manager.plans, "3d_fullres", 0, make_dataset_json(), CPU)
        other.load_checkpoint(given)
        assert other.current_epoch == 1


def test_the_augmentation_is_a_list_of_steps_with_probabilities():
    pipeline = nnUNetTrainer.get_training_transforms((8, 8, 8), (-0.5, 0.5), None, (0, 1, 2), False)
    random_steps = [step for step in pipeline.transforms if isinstance(step, RandomTransform)]
    assert isinstance(pipeline.transforms, list) and len(random_steps) == 7
    assert all(0 < step.apply_probability < 1 and callable(step.transform) for step in random_steps)


def test_data_loaders_are_extended_where_they_always_were():
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

    for name in ("generate_train_batch", "get_bbox", "get_indices"):
        assert callable(getattr(nnUNetDataLoader, name))
    for name in ("load_case", "save_case", "save_seg", "get_identifiers", "unpack_dataset"):
        assert callable(getattr(nnUNetBaseDataset, name))


def test_wrappers_are_peeled_off_in_the_order_in_which_users_do(trainer):
    trainer.initialize()

    class Compiled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    inner = trainer.network
    trainer.network = Compiled(inner)
    trainer.set_deep_supervision_enabled(False)
    assert inner.decoder.deep_supervision is False


def test_the_gradient_scaler_may_be_switched_off(trainer):
    trainer.grad_scaler = None
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
