"""Primus trainers: found by name, built as specified, trained, continued and used for prediction."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from importable_torchvision import make_torchvision_importable
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training import steps
from nnunetv2.training.nnUNetTrainer.primus import networks, primus_trainers
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

CPU = torch.device("cpu")
PATCH = [16, 16, 24]
FIRST_GENERATION = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
"""Width, depth and heads."""

NETWORKS = {
    **{f"nnUNet_Primus_{size}_Trainer": "Primus" for size in FIRST_GENERATION},
    **{f"nnUNet_PrimusV{number}{size}_Trainer": f"PrimusV{number}{size}" for number in (2, 3) for size in "SBML"},
}
VARIANTS = {
    "nnUNet_Primus_M_Trainer_BS8": "nnUNet_Primus_M_Trainer",
    "nnUNet_Primus_M_Trainer_BS8_2e4": "nnUNet_Primus_M_Trainer",
    **{f"_Primus_{size}_96_BS1": f"nnUNet_Primus_{size}_Trainer" for size in "SBM"},
    "_Primus_L_48_BS1": "nnUNet_Primus_L_Trainer",
}


def make(name: str, plans: dict | None = None):
    plans = plans or make_plans(stages=3, patch_size=PATCH)
    (configuration,) = plans["configurations"]
    return recursive_find_trainer_class_by_name(name)(plans, configuration, 0, make_dataset_json(), CPU)


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preprocessed")
    make_tiny_dataset(folder, stages=3, cases=5, patch_size=PATCH)
    return folder


@pytest.fixture
def tiny(preprocessed, tmp_path, monkeypatch):
    """Point the environment at the tiny dataset, and train in this process alone."""
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)


def start(name: str, *, goes_on: bool = False):
    """Make a trainer of two steps; one that goes on trains an epoch more."""
    trainer = get_trainer_from_args(NAME, "3d_fullres", 0, name, continue_training=goes_on, device=CPU)
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1
    trainer.num_epochs = 2 if goes_on else 1
    if goes_on:
        maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


@pytest.mark.parametrize("name", [*NETWORKS, *VARIANTS])
def test_a_primus_trainer_has_the_settings_of_the_release(name):
    trainer = make(name)
    assert type(trainer).__name__ == name and type(trainer).__doc__
    assert [kind.__name__ for kind in type(trainer).__mro__][-4:-1] == [
        "AbstractPrimus",
        "nnUNetTrainer_warmup",
        "nnUNetTrainer",
    ]
    assert VARIANTS.get(name) in (None, *(kind.__name__ for kind in type(trainer).__mro__))
    assert trainer.initial_lr == (2e-4 if name.endswith("2e4") else 3e-4)
    assert (trainer.weight_decay, trainer.enable_deep_supervision, trainer.num_epochs) == (5e-2, False, 1000)
    assert (trainer.warmup_duration_whole_net, trainer.max_gradient_norm) == (50, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_primus_network_is_built_as_specified(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        primus_trainers, "find_primus", lambda network: lambda **options: asked.append((network, options))
    )
    plans = PlansManager(make_plans(stages=3, patch_size=PATCH))
    recursive_find_trainer_class_by_name(name).build_network_architecture(
        plans, plans.get_configuration("3d_fullres"), 2, 5, enable_deep_supervision=False
    )
    expected = {
        "input_channels": 2,
        "patch_embed_size": (8, 8, 8),
        "input_shape": tuple(PATCH),
        "drop_path_rate": 0.2,
        "scale_attn_inner": True,
        "init_values": 0.1,
    }
    if NETWORKS[name] == "Primus":
        width, depth, heads = FIRST_GENERATION[name.split("_")[2]]
        expected |= {"num_classes": 5, "embed_dim": width, "eva_depth": depth, "eva_numheads": heads}
    else:
        expected |= {"output_channels": 5}
    assert asked == [(NETWORKS[name], expected)]


@pytest.mark.slow
def test_the_smallest_primus_has_its_full_size():
    make_torchvision_importable()
    trainer = make("nnUNet_Primus_S_Trainer")
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3)
    assert sum(weights.numel() for weights in network.parameters()) == 23_221_407


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "small_primus")
@pytest.mark.parametrize("name", [*NETWORKS, "nnUNet_Primus_M_Trainer_BS8", "_Primus_L_48_BS1"])
def test_a_primus_trainer_trains_goes_on_and_predicts(name):
    trainer = start(name)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    optimizer = trainer.optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["weight_decay"] == 5e-2 and not optimizer.defaults["amsgrad"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 / 50)  # the first step of the warm-up
    second = start(name, goes_on=True)
    assert second.current_epoch == 1
    second.run_training()
    assert second.current_epoch == 2 and np.isfinite(second.logger.get_value("val_losses", 1))
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(second.output_folder_base, (0,))
    image = np.random.default_rng(0).normal(size=(1, 20, 22, 24)).astype(np.float32)
    labels = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    assert labels.shape == (20, 22, 24) and labels.max() <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "small_primus")
def test_a_primus_trainer_validates():
    trainer = start("nnUNet_PrimusV2S_Trainer")
    trainer.run_training()
    trainer.perform_actual_validation()
    assert Path(trainer.output_folder, "validation", "summary.json").is_file()


@pytest.mark.usefixtures("tiny", "small_primus")
def test_primus_clips_gradients_at_one(monkeypatch):
    norms = []
    monkeypatch.setattr(steps.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    start("nnUNet_Primus_S_Trainer").run_training()
    assert set(norms) == {1}
    norms.clear()
    start("nnUNetTrainer").run_training()
    assert set(norms) == {12}


@pytest.mark.usefixtures("tiny", "small_primus")
def test_primus_trains_in_float32_on_a_cpu_with_bfloat16(monkeypatch):
    monkeypatch.setenv("nnUNet_cpu_autocast", "1")
    trainer = start("nnUNet_Primus_S_Trainer")
    seen = []
    trainer.initialize()
    trainer.network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.run_training()
    assert set(seen) == {torch.float32}


def test_batches_of_eight_leave_the_plans_alone():
    for name in ("nnUNet_Primus_M_Trainer_BS8", "nnUNet_Primus_M_Trainer_BS8_2e4", "nnUNet_Trainer_BS8"):
        trainer = make(name)
        assert trainer.configuration_manager.batch_size == 8
        assert trainer.plans_manager.plans["configurations"]["3d_fullres"]["batch_size"] == 2
    assert make("nnUNet_Trainer_BS8").initial_lr == 1e-2


def test_patches_of_a_trainer_are_in_the_plans_of_its_model_only():
    plans = make_plans(stages=3, patch_size=PATCH)
    before = copy.deepcopy(plans)
    trainer = make("_Primus_L_48_BS1", plans)
    assert plans == before
    for told in (
        trainer.configuration_manager.configuration,
        trainer.plans_manager.plans["configurations"]["3d_fullres"],
    ):
        assert (told["patch_size"], told["batch_size"]) == ([48, 48, 48], 1)
    trainer.configuration_manager.patch_size[0] = 40
    assert make("_Primus_L_48_BS1").configuration_manager.patch_size == [48, 48, 48]


def test_a_configuration_that_inherits_takes_the_patch_of_its_trainer():
    plans = make_plans(stages=3, patch_size=PATCH)
    plans["configurations"]["3d_small"] = {"inherits_from": "3d_fullres"}
    trainer_class = recursive_find_trainer_class_by_name("_Primus_S_96_BS1")
    assert trainer_class(plans, "3d_small", 0, make_dataset_json(), CPU).configuration_manager.patch_size == [96] * 3
    with pytest.raises(RuntimeError, match="no configuration '3d_big'"):
        trainer_class(plans, "3d_big", 0, make_dataset_json(), CPU)


@pytest.mark.parametrize(
    ("patch", "nearest"),
    [((20, 16, 24), "(24, 16, 24)"), ((17, 31, 3), "(16, 32, 8)"), ((28, 256, 255), "(32, 256, 256)")],
)
def test_a_patch_that_does_not_fit_is_refused_before_training(tiny, monkeypatch, patch, nearest):
    monkeypatch.setattr(primus_trainers, "find_primus", lambda name: pytest.fail("it went on"))
    trainer = make("nnUNet_PrimusV2M_Trainer", make_plans(stages=3, patch_size=list(patch)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  looked at below
        trainer.run_training()
    message = str(caught.value)
    assert str(patch) in message and f"nearest that fits is {nearest}" in message and "\n" not in message
    assert trainer.current_epoch == 0


def test_two_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"nnUNet_Primus_S_Trainer trains 3D configurations only; .*\(16, 24\)"):
        make("nnUNet_Primus_S_Trainer", make_plans(dims=2, stages=3)).initialize()


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_does_not_import_is_named(monkeypatch, package):
    make_torchvision_importable()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=f"Primus needs {package}, which does not import here") as caught:
        make("nnUNet_Primus_B_Trainer").initialize()
    assert "\n" not in str(caught.value)
    other = make("nnUNet_Trainer_BS8")
    other.build_network_architecture(other.plans_manager, other.configuration_manager, 1, 3)


def test_a_torchvision_of_another_build_is_named(monkeypatch):
    def break_off(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(networks, "import_module", break_off)
    with pytest.raises(RuntimeError, match="needs torchvision.*nms does not exist.*belongs to the installed torch"):
        networks.find_primus("Primus")


def test_a_network_that_is_not_there_yet_is_named(monkeypatch):
    monkeypatch.setattr(networks, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"PrimusV3S needs dynamic-network-architectures 0\.4\.4 or later"):
        networks.find_primus("PrimusV3S")


def test_the_base_of_primus_trainers_has_no_network():
    trainer = make("AbstractPrimus")
    with pytest.raises(NotImplementedError, match="choose one of its subclasses"):
        trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3)
