"""Trainer variants: they are found by name, change what they say, and train."""

from __future__ import annotations

import importlib
import inspect
import pickle

import numpy as np
import pytest
import torch
from tiny_dataset import make_dataset_json, make_plans, make_tiny_dataset
from variant_table import BY_NAME, NAMES

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.ignored_voxels import WithoutIgnoredVoxels
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

CPU = torch.device("cpu")
PACKAGE = "nnunetv2.training.nnUNetTrainer.variants"
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "blob": 1, "ignore": 2}}
REGIONS_IGNORE = {"labels": {**REGIONS["labels"], "ignore": 3}, "regions_class_order": [1, 2]}


def make(name: str, plans: dict, **labels) -> nnUNetTrainer:
    (configuration,) = plans["configurations"]
    trainer = recursive_find_trainer_class_by_name(name)(
        plans=plans, configuration=configuration, fold=0, dataset_json=make_dataset_json(**labels), device=CPU
    )
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1
    return trainer


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_on_paper", "adan")
@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_found_by_name_and_differs_in_what_it_says(name):
    variant = BY_NAME[name]
    trainer_class = recursive_find_trainer_class_by_name(name)
    module = importlib.import_module(f"{PACKAGE}.{variant.module}")
    assert trainer_class is getattr(module, name) and trainer_class.__module__ == module.__name__
    assert trainer_class.__name__ == name and trainer_class.__doc__
    assert trainer_class.__mro__[1].__name__ == variant.parent
    assert list(inspect.signature(trainer_class).parameters)[:5] in (
        ["plans", "configuration", "fold", "dataset_json", "device"],
        ["arguments", "options"],
    )
    trainer = make(name, make_plans(stages=3))
    default = nnUNetTrainer(make_plans(stages=3), "3d_fullres", 0, make_dataset_json(), CPU)
    inherited = [BY_NAME[parent.__name__].settings for parent in trainer_class.__mro__ if parent.__name__ in BY_NAME]
    expected = {key: value for settings in reversed(inherited) for key, value in settings.items()}
    for key in (
        "num_epochs",
        "initial_lr",
        "weight_decay",
        "enable_deep_supervision",
        "probabilistic_oversampling",
        "oversample_foreground_percent",
        "disable_checkpointing",
    ):
        assert getattr(trainer, key) == expected.get(key, getattr(default, key)), key
    assert all(getattr(trainer, key) == value for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_on_paper", "adan")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "training_length" in variant.module else name
        for name, variant in BY_NAME.items()
    ],
)
def test_a_variant_trains(plans, name):
    trainer = make(name, plans)
    trainer.num_epochs, trainer.disable_checkpointing = 1, True
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    assert np.isfinite(trainer.logger.get_value("val_losses", 0))
    assert trainer.current_epoch == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerDA5",
        "nnUNetTrainerDA5ord0",
        "nnUNetTrainer_DASegOrd0",
        "nnUNetTrainer_onlyMirror01_DA5",
        "nnUNetTrainerBN",
        "nnUNetTrainerDiceLoss",
    ],
)
def test_a_variant_trains_in_2d(roots, monkeypatch, name):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make(name, make_tiny_dataset(roots["nnUNet_preprocessed"], dims=2, stages=3))
    trainer.num_epochs, trainer.disable_checkpointing = 1, True
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))


# --------------------------------------------------------------------------------------------------- settings


def test_generated_classes_are_pickled_by_name():
    for name in ("nnUNetTrainer_20epochs", "nnUNetTrainer_250epochs_NoMirroring"):
        trainer_class = recursive_find_trainer_class_by_name(name)
        assert pickle.loads(pickle.dumps(trainer_class)) is trainer_class


def test_variants_are_constructed_as_in_earlier_releases():
    trainer_class = recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs")
    trainer = trainer_class(make_plans(), "3d_fullres", 0, make_dataset_json(), True, CPU)
    assert trainer.num_epochs == 5 and trainer.device == CPU


def test_settings_of_combined_variants_add_up():
    adam = recursive_find_trainer_class_by_name("nnUNetTrainerAdam3en4")
    short = recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs")

    class Both(adam, short):
        pass

    trainer = Both(make_plans(), "3d_fullres", 0, make_dataset_json(), CPU)
    assert (trainer.initial_lr, trainer.num_epochs) == (3e-4, 5)


def test_settings_do_not_replace_a_constructor():
    with pytest.raises(TypeError, match="constructor of its own"):

        @with_settings(num_epochs=1)
        class Own(nnUNetTrainer):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)


# ----------------------------------------------------------------------------------------------------- losses


def loss_of(name, **labels):
    return make(name, make_plans(stages=3), **labels)._build_loss()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nnUNetTrainerCELoss", RobustCrossEntropyLoss),
        ("nnUNetTrainerTopk10Loss", TopKLoss),
        ("nnUNetTrainerTopk10LossLS01", TopKLoss),
        ("nnUNetTrainerDiceTopK10Loss", DC_and_topk_loss),
        ("nnUNetTrainerDiceLoss", MemoryEfficientSoftDiceLoss),
        ("nnUNetTrainerDiceCELoss_noSmooth", DC_and_CE_loss),
    ],
)
def test_losses_are_added_up_over_resolutions(name, kind):
    loss = loss_of(name)
    assert isinstance(loss, DeepSupervisionWrapper) and type(loss.loss) is kind
    assert loss.weight_factors == (1, 0)


def test_losses_of_labels_know_the_ignore_label():
    assert loss_of("nnUNetTrainerCELoss").loss.ignore_index == -100
    assert loss_of("nnUNetTrainerCELoss", **IGNORE).loss.ignore_index == 2
    top = loss_of("nnUNetTrainerTopk10LossLS01", **IGNORE).loss
    assert (top.ignore_index, top.k, top.label_smoothing) == (2, 10, 0.1)
    both = loss_of("nnUNetTrainerDiceTopK10Loss", **IGNORE).loss
    assert (both.ignore_label, both.ce.k, both.dc.do_bg, both.dc.smooth) == (2, 10, False, 1e-5)


@pytest.mark.parametrize(
    "name",
    ["nnUNetTrainerCELoss", "nnUNetTrainerTopk10Loss", "nnUNetTrainerTopk10LossLS01", "nnUNetTrainerDiceTopK10Loss"],
)
def test_losses_of_labels_refuse_regions(name):
    with pytest.raises(AssertionError, match="cannot train regions"):
        loss_of(name, **REGIONS)


def test_a_dice_without_smoothing_is_that_of_the_default_loss_otherwise():
    name = "nnUNetTrainerDiceCELoss_noSmooth"
    labels, regions = loss_of(name), loss_of(name, **REGIONS)
    assert labels.loss.dc.smooth == regions.loss.dc.smooth == 0
    assert type(regions.loss) is DC_and_BCE_loss and regions.loss.dc.do_bg and not labels.loss.dc.do_bg


@pytest.mark.parametrize("labels", [IGNORE, REGIONS_IGNORE])
def test_the_dice_loss_leaves_ignored_voxels_out(labels):
    loss = loss_of("nnUNetTrainerDiceLoss", **labels).loss
    assert type(loss) is WithoutIgnoredVoxels
    regions = labels is REGIONS_IGNORE
    logits = torch.randn(1, 2, 4, 4, 4)
    target = torch.randint(0, 2, (1, 2 if regions else 1, 4, 4, 4))
    ignored = torch.zeros((1, 1, 4, 4, 4), dtype=torch.bool)
    ignored[..., 2:] = True
    given = torch.cat([target.bool(), ignored], 1) if regions else target.masked_fill(ignored, 2)
    expected = loss.loss(logits[..., :2], target[..., :2])
    assert loss(logits, given) == pytest.approx(expected)


def test_the_mean_of_regions_is_an_option():
    assert loss_of("nnUNetTrainerMeanBCELoss", **REGIONS_IGNORE).loss.average_over_channels
    with pytest.raises(AssertionError, match="for regions"):
        loss_of("nnUNetTrainerMeanBCELoss")


# ------------------------------------------------------------------------------------- optimizers and schedules


def initialized(name, plans, **attributes):
    trainer = make(name, plans)
    for key, value in attributes.items():
        setattr(trainer, key, value)
    trainer.initialize()
    return trainer


def rates(trainer, epochs):
    found = []
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer.logger.local_logger.my_fantastic_logging["lrs"].clear()
        trainer.logger.local_logger.my_fantastic_logging["lrs"].extend([0] * (epoch + 1))
        found.append(trainer.optimizer.param_groups[0]["lr"])
    return found


def test_adam_has_the_settings_of_the_reference(plans):
    adamw = initialized("nnUNetTrainerAdam3en4", plans).optimizer
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"], adamw.defaults["amsgrad"]) == (3e-4, 3e-5, True)
    adam = initialized("nnUNetTrainerVanillaAdam1en3", plans).optimizer
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["lr"], adam.defaults["weight_decay"], adam.defaults["amsgrad"]) == (1e-3, 3e-5, False)


def test_a_missing_adan_is_named(plans, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "adan_pytorch", None)
    with pytest.raises(RuntimeError, match="pip install adan-pytorch"):
        initialized("nnUNetTrainerAdan", plans)


@pytest.mark.usefixtures("adan")
@pytest.mark.parametrize("name", ["nnUNetTrainerCosAnneal", "nnUNetTrainerAdanCosAnneal"])
def test_the_learning_rate_falls_along_a_cosine(plans, name):
    trainer = initialized(name, plans, num_epochs=4)
    assert rates(trainer, 4) == pytest.approx([0.01, 0.00853553, 0.005, 0.00146447], abs=1e-8)


def test_a_warm_up_climbs_and_then_falls(plans):
    trainer = initialized("nnUNetTrainer_warmup", plans, num_epochs=6, warmup_duration_whole_net=2)
    optimizer = trainer.optimizer
    assert trainer.training_stage == "warmup_all"
    assert rates(trainer, 6) == pytest.approx([0.005, 0.01, 0.01, *[0.01 * (1 - i / 4) ** 0.9 for i in (1, 2, 3)]])
    assert trainer.training_stage == "train" and trainer.optimizer is optimizer
    with pytest.raises(ValueError, match="no stage 'cooldown'"):
        trainer.configure_optimizers("cooldown")


@pytest.mark.parametrize(("epochs", "stage"), [(1, "warmup_all"), (3, "train")])
def test_a_warm_up_goes_on_in_the_stage_of_its_epoch(plans, epochs, stage):
    first = make("nnUNetTrainer_warmup", plans)
    first.num_epochs, first.warmup_duration_whole_net = epochs, 2
    first.run_training()
    second = make("nnUNetTrainer_warmup", plans)
    second.num_epochs, second.warmup_duration_whole_net = 5, 2
    second.load_checkpoint(f"{first.output_folder}/checkpoint_final.pth")
    assert second.training_stage == stage and second.current_epoch == epochs
    momentum = [state["momentum_buffer"] for state in second.optimizer.state.values()]
    assert momentum and all(tensor.abs().sum() > 0 for tensor in momentum)
    second.run_training()
    assert len(second.logger.get_value("lrs", None)) == 5


# ------------------------------------------------------------------------------------ networks, data, sampling


def test_batch_normalization_replaces_that_of_the_plans(plans):
    trainer = initialized("nnUNetTrainerBN", plans)
    kinds = {type(module) for module in trainer.network.modules()}
    assert torch.nn.BatchNorm3d in kinds and torch.nn.InstanceNorm3d not in kinds
    assert trainer.configuration_manager.network_arch_init_kwargs["norm_op"].endswith("BatchNorm3d")


def test_a_network_without_a_choice_of_normalization_is_refused():
    trainer = make("nnUNetTrainerBN", make_plans())
    del trainer.configuration_manager.network_arch_init_kwargs["norm_op"]
    with pytest.raises(RuntimeError, match="no argument norm_op"):
        trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)


def geometry(name, dims=3, patch=None):
    plans = make_plans(dims=dims)
    if patch:
        next(iter(plans["configurations"].values()))["patch_size"] = patch
    trainer = make(name, plans)
    rotation, dummy, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return (
        round(np.rad2deg(rotation[1])),
        dummy,
        [int(length) for length in size],
        axes,
        trainer.inference_allowed_mirroring_axes,
    )


@pytest.mark.parametrize(
    ("name", "axes_3d", "axes_2d"),
    [
        ("nnUNetTrainerNoDA", None, None),
        ("nnUNetTrainerNoMirroring", None, None),
        ("nnUNetTrainer_onlyMirror01", (0, 1), (0,)),
        ("nnUNetTrainer_onlyMirror01_DASegOrd0", (0, 1), (0,)),
        ("nnUNetTrainer_onlyMirror01_DA5", (0, 1), (0,)),
        ("nnUNetTrainer_DASegOrd0_NoMirroring", None, None),
        ("nnUNetTrainer_250epochs_NoMirroring", None, None),
        ("nnUNetTrainerDA5", (0, 1, 2), (0, 1)),
        ("nnUNetTrainer_noDummy2DDA", (0, 1, 2), (0, 1)),
    ],
)
def test_axes_are_mirrored_alike_in_training_and_inference(name, axes_3d, axes_2d):
    assert geometry(name, 3)[3:] == (axes_3d, axes_3d)
    assert geometry(name, 2)[3:] == (axes_2d, axes_2d)


def test_thin_patches_are_turned_in_all_directions_on_request():
    thin = [20, 320, 256]
    assert geometry("nnUNetTrainer", patch=thin)[:3] == (180, True, [20, 376, 376])
    degrees, dummy, size, *_ = geometry("nnUNetTrainer_noDummy2DDA", patch=thin)
    assert (degrees, dummy) == (30, False) and size[0] > 20


def test_patches_that_are_not_augmented_are_not_enlarged():
    assert geometry("nnUNetTrainerNoDA", patch=[20, 320, 256])[2] == [20, 320, 256]


def test_da5_loads_patches_for_its_larger_scales():
    assert geometry("nnUNetTrainerDA5", patch=[128, 128, 128])[2] == [249, 249, 249]


def test_foreground_is_drawn_by_lot(plans):
    trainer = make("nnUNetTrainer_probabilisticOversampling", plans)
    assert trainer.oversample_foreground_percent == 0.5
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    assert loader.data_loader.get_do_oversample.__name__ != "_oversample_last_XX_percent"
    draws = {loader.data_loader.get_do_oversample(0) for _ in range(50)}
    assert draws == {True, False}


def test_the_probability_of_foreground_does_not_depend_on_the_process(plans, monkeypatch):
    trainer = make("nnUNetTrainer_probabilisticOversampling_010", plans)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    trainer.is_ddp = True
    trainer._set_batch_size_and_oversample()
    assert (trainer.batch_size, trainer.oversample_foreground_percent) == (1, 0.1)
