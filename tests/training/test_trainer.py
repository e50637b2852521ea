import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainer_onlyMirror01,
    nnUNetTrainerNoMirroring,
)
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs

CPU = torch.device("cpu")
CHECKPOINT_KEYS = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}
CURVES = {
    "mean_fg_dice",
    "ema_fg_dice",
    "dice_per_class_or_region",
    "train_losses",
    "val_losses",
    "lrs",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
}


@pytest.fixture
def dataset(roots, monkeypatch) -> dict:
    """Plans of a dataset that is ready for training in this process alone."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return make_tiny_dataset(roots["nnUNet_preprocessed"])


def make_trainer(plans, trainer_class=nnUNetTrainer, *, epochs=2, fold=0, dataset_json=None, **attributes):
    (configuration,) = plans["configurations"]
    trainer = trainer_class(
        plans=plans,
        configuration=configuration,
        fold=fold,
        dataset_json=dataset_json or make_dataset_json(),
        device=CPU,
    )
    trainer.num_epochs = epochs
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 2
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def curves_of(trainer):
    return trainer.logger.local_logger.my_fantastic_logging


# ------------------------------------------------------------------------------------------------- construction


def test_defaults_are_those_of_the_reference(dataset, roots):
    trainer = nnUNetTrainer(dataset, "3d_fullres", 0, make_dataset_json(), CPU)
    assert (trainer.initial_lr, trainer.weight_decay, trainer.oversample_foreground_percent) == (1e-2, 3e-5, 0.33)
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (250, 50)
    assert (trainer.num_epochs, trainer.current_epoch, trainer.save_every) == (1000, 0, 50)
    assert trainer.enable_deep_supervision and not trainer.probabilistic_oversampling
    assert trainer._best_ema is None and trainer.grad_scaler is None and not trainer.is_ddp
    base = roots["nnUNet_results"] / NAME / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert trainer.output_folder_base == str(base) and trainer.output_folder == str(base / "fold_0")
    folder = roots["nnUNet_preprocessed"] / NAME
    assert trainer.preprocessed_dataset_folder_base == str(folder)
    assert trainer.preprocessed_dataset_folder == str(folder / "nnUNetPlans_3d_fullres")
    assert not trainer.is_cascaded and trainer.folder_with_segs_from_previous_stage is None


def test_the_signature_of_the_constructor_is_the_one_users_call():
    names = list(inspect.signature(nnUNetTrainer.__init__).parameters)
    assert names[:6] == ["self", "plans", "configuration", "fold", "dataset_json", "device"]
    network = inspect.signature(nnUNetTrainer.build_network_architecture)
    assert list(network.parameters) == [
        "plans_manager",
        "configuration_manager",
        "num_input_channels",
        "num_output_channels",
        "enable_deep_supervision",
    ]


def test_plans_are_not_changed_and_continue_training_is_not_stored():
    plans = {**make_plans(), "continue_training": True}
    trainer = make_trainer(plans)
    assert plans["continue_training"] and trainer.logger.resume
    assert "continue_training" not in trainer.my_init_kwargs["plans"]
    assert trainer.my_init_kwargs["plans"] is trainer.plans_manager.plans
    assert list(trainer.my_init_kwargs) == ["plans", "configuration", "fold", "dataset_json", "device"]


def test_a_trainer_can_be_constructed_without_any_folder():
    trainer = make_trainer(make_plans())
    assert trainer.output_folder is trainer.log_file is trainer.preprocessed_dataset_folder is None
    trainer.print_to_log_file("goes to the console only")
    with pytest.raises(RuntimeError, match="nnUNet_preprocessed and nnUNet_results was not set"):
        trainer.initialize()


def test_a_cascade_names_the_folder_of_its_previous_stage(roots):
    plans = make_plans()
    low = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {
        "3d_lowres": {**low, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_lowres", "previous_stage": "3d_lowres"},
    }
    trainer = nnUNetTrainer(plans, "3d_cascade_fullres", 1, make_dataset_json(), CPU)
    assert trainer.is_cascaded
    assert trainer.folder_with_segs_from_previous_stage == str(
        roots["nnUNet_results"]
        / NAME
        / "nnUNetTrainer__nnUNetPlans__3d_lowres"
        / "predicted_next_stage"
        / "3d_cascade_fullres"
    )


class OldTrainer(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, unpack_dataset=True, device=CPU):
        super().__init__(plans, configuration, fold, dataset_json, unpack_dataset, device)


class KeywordTrainer(nnUNetTrainer):
    def __init__(self, *args, flavour="vanilla", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour


@pytest.mark.parametrize("trainer_class", [OldTrainer, KeywordTrainer])
def test_constructors_of_third_parties_are_tolerated(trainer_class):
    trainer = make_trainer(make_plans(), trainer_class)
    assert trainer.device == CPU
    assert trainer.my_init_kwargs["configuration"] == "3d_fullres" and trainer.my_init_kwargs["device"] == CPU


def test_the_log_file_appears_with_the_first_line_and_begins_with_the_citation(dataset):
    trainer = make_trainer(dataset)
    assert Path(trainer.output_folder).is_dir() and not Path(trainer.log_file).exists()
    trainer.print_to_log_file("first", 1, add_timestamp=False)
    text = Path(trainer.log_file).read_text()
    assert "Nature Methods" in text and 71 * "#" in text and text.endswith("\nfirst 1 \n")


@pytest.mark.slow
def test_names_that_third_parties_import_from_the_trainer_module_exist():
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    for name in (
        "join",
        "load_json",
        "isfile",
        "save_json",
        "maybe_mkdir_p",
        "autocast",
        "dist",
        "DDP",
        "GradScaler",
        "OptimizedModule",
        "SpatialTransform",
        "ComposeTransforms",
        "RandomTransform",
        "np",
        "torch",
    ):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("device", "choice", "expected"),
    [
        ("cuda", None, True),
        ("cuda", "TRUE", True),
        ("cuda", "1", True),
        ("cuda", "f", False),
        ("cpu", "t", False),
        ("mps", None, False),
    ],
)
def test_compiling_depends_on_device_and_environment(monkeypatch, device, choice, expected):
    if choice is not None:
        monkeypatch.setenv("nnUNet_compile", choice)
    trainer = make_trainer(make_plans())
    trainer.device = torch.device(device)
    assert trainer._do_i_compile() is expected


# --------------------------------------------------------------------------------------------------- a training


HOOKS = (
    "on_train_start",
    "on_epoch_start",
    "on_train_epoch_start",
    "train_step",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "validation_step",
    "on_validation_epoch_end",
    "on_epoch_end",
    "on_train_end",
    "initialize",
    "get_dataloaders",
    "print_plans",
    "plot_network_architecture",
    "_save_debug_information",
)


def record_calls(trainer):
    """Wrap the hooks of a trainer so that the returned list tells which were called."""
    called = []

    def recorded(name, hook):
        def call(*args):
            called.append(name)
            return hook(*args)

        return call

    for name in HOOKS:
        setattr(trainer, name, recorded(name, getattr(trainer, name)))
    return called


def test_hooks_are_called_in_the_order_of_the_reference(dataset):
    trainer = make_trainer(dataset, epochs=1)
    called = record_calls(trainer)
    trainer.run_training()
    assert called == [
        "on_train_start",
        "initialize",
        "get_dataloaders",
        "print_plans",
        "plot_network_architecture",
        "_save_debug_information",
        "on_epoch_start",
        "on_train_epoch_start",
        "train_step",
        "train_step",
        "on_train_epoch_end",
        "on_validation_epoch_start",
        "validation_step",
        "validation_step",
        "on_validation_epoch_end",
        "on_epoch_end",
        "on_train_end",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_three_epochs_leave_the_files_and_figures_of_the_reference(dataset):
    trainer = make_trainer(dataset, epochs=3, save_every=1)
    trainer.run_training()

    fold = Path(trainer.output_folder)
    names = {path.name for path in fold.iterdir()}
    (log,) = fold.glob("training_log_*.txt")
    assert names >= {
        log.name,
        "progress.png",
        "debug.json",
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "augmentation_examples.png",
    }
    assert "checkpoint_latest.pth" not in names and not [name for name in names if name.startswith(".")]
    assert {path.name for path in fold.parent.iterdir()} == {
        "plans.json",
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0",
    }
    assert json.loads((fold.parent / "plans.json").read_text()) == dataset

    checkpoint = load_checkpoint_file(fold / "checkpoint_final.pth")
    assert set(checkpoint) == CHECKPOINT_KEYS
    assert checkpoint["current_epoch"] == 3 and trainer.current_epoch == 3
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["grad_scaler_state"] is None
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert checkpoint["init_args"]["plans"] == dataset and checkpoint["init_args"]["fold"] == 0
    assert {key: len(values) for key, values in checkpoint["logging"].items()} == dict.fromkeys(CURVES, 3)
    assert [round(lr, 5) for lr in checkpoint["logging"]["lrs"]] == [0.01, 0.00694, 0.00372]

    text = log.read_text()
    for wanted in (
        "Epoch 2 \n",
        "Current learning rate: 0.00694 ",
        "train_loss ",
        "val_loss ",
        "Pseudo dice [",
        "Epoch time: ",
        "New best EMA pseudo Dice: ",
        "Training done. ",
        "do_dummy_2d_data_aug: False",
    ):
        assert wanted in text
    assert "np.float" not in text
    debug = json.loads((fold / "debug.json").read_text())
    assert debug["network"] == "PlainConvUNet" and debug["cudnn_version"] == "None" and debug["device"] == "cpu"
    assert "loss" in debug and "save_checkpoint" not in debug
    assert all(isinstance(value, str) for value in debug.values())


def test_aliases_of_a_weight_are_all_saved(dataset):
    trainer = make_trainer(dataset)
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder, "c.pth")))
    weights = load_checkpoint_file(Path(trainer.output_folder, "c.pth"))["network_weights"]
    stem = "encoder.stages.0.0.convs.0"
    names = [f"{prefix}{stem}.{layer}.weight" for prefix in ("", "decoder.") for layer in ("conv", "all_modules.0")]
    assert len({weights[name].data_ptr() for name in names}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "trainer_class",
    [
        nnUNetTrainer,
        nnUNetTrainerNoDeepSupervision,
        nnUNetTrainerNoDA,
        nnUNetTrainerNoMirroring,
        nnUNetTrainer_onlyMirror01,
    ],
)
def test_variants_train_in_2d_and_3d(roots, monkeypatch, trainer_class, dims):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = make_tiny_dataset(roots["nnUNet_preprocessed"], dims=dims, stages=3)
    trainer = make_trainer(plans, trainer_class, epochs=1)
    trainer.run_training()
    assert np.isfinite(curves_of(trainer)["train_losses"][0]) and np.isfinite(curves_of(trainer)["val_losses"][0])
    axes = {
        nnUNetTrainerNoDA: None,
        nnUNetTrainerNoMirroring: None,
        nnUNetTrainer_onlyMirror01: (0, 1)[: dims - 1],
    }.get(trainer_class, (0, 1, 2)[:dims])
    assert trainer.inference_allowed_mirroring_axes == axes


@pytest.mark.parametrize(
    "labels",
    [
        {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
        {"labels": {"background": 0, "blob": 1, "ignore": 2}},
        {"labels": {"background": 0, "whole": [1], "ignore": 2}, "regions_class_order": [1]},
    ],
)
def test_regions_and_ignored_voxels_are_trained(dataset, labels):
    trainer = make_trainer(dataset, epochs=1, dataset_json=make_dataset_json(**labels))
    trainer.run_training()
    assert np.isfinite(curves_of(trainer)["train_losses"][0])
    assert len(curves_of(trainer)["dice_per_class_or_region"][0]) == trainer.label_manager.num_segmentation_heads - (
        not trainer.label_manager.has_regions
    )


@pytest.mark.slow
def test_a_network_learns(dataset, monkeypatch):
    torch.manual_seed(0)
    np.random.seed(0)
    trainer = make_trainer(dataset, nnUNetTrainerNoDA, epochs=2, num_iterations_per_epoch=30)
    trainer.run_training()
    losses = curves_of(trainer)["train_losses"]
    assert losses[-1] < losses[0] - 0.3


class LegacyTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        architecture_class_name,
        arch_init_kwargs,
        arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=True,
    ):
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        return get_network_from_plans(
            architecture_class_name,
            arch_init_kwargs,
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
        )


def test_networks_of_the_legacy_signature_are_built(dataset):
    trainer = make_trainer(dataset, LegacyTrainer)
    with pytest.warns(DeprecationWarning, match="build_network_architecture"):
        trainer.initialize()
    assert trainer.network.decoder.deep_supervision


def test_initializing_twice_is_refused(dataset):
    trainer = make_trainer(dataset)
    trainer.initialize()
    with pytest.raises(RuntimeError, match="twice"):
        trainer.initialize()


def test_edits_between_construction_and_initialization_count(dataset):
    trainer = make_trainer(dataset, enable_deep_supervision=False)
    trainer.configuration_manager.configuration["batch_size"] = 3
    trainer.initialize()
    assert trainer.batch_size == 3 and not trainer.network.decoder.deep_supervision
    assert trainer._get_deep_supervision_scales() is None
    data = torch.zeros(1, 1, *trainer.configuration_manager.patch_size)
    assert trainer.network(data).shape[:2] == (1, 3)


# ------------------------------------------------------------------------------------------------ going on


class StoppedError(Exception):
    pass


def stop_at(trainer, epoch):
    start = trainer.on_epoch_start

    def stop():
        if trainer.current_epoch == epoch:
            raise StoppedError
        start()

    trainer.on_epoch_start = stop


def test_an_interrupted_training_goes_on_where_it_was(dataset):
    interrupted = make_trainer(dataset, epochs=3, save_every=1)
    stop_at(interrupted, 2)
    with pytest.raises(StoppedError):
        interrupted.run_training()

    trainer = make_trainer(dataset, epochs=3)
    trainer.load_checkpoint(str(Path(interrupted.output_folder, "checkpoint_latest.pth")))
    assert trainer.current_epoch == 2 and trainer._best_ema == interrupted._best_ema
    assert curves_of(trainer)["train_losses"] == curves_of(interrupted)["train_losses"]
    for ours, theirs in zip(trainer.network.parameters(), interrupted.network.parameters()):
        assert torch.equal(ours, theirs)
    momentum = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    expected = [state["momentum_buffer"] for state in interrupted.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, expected)) and momentum

    trainer.run_training()
    assert [round(lr, 5) for lr in curves_of(trainer)["lrs"]] == [0.01, 0.00694, 0.00372]
    assert not Path(trainer.output_folder, "checkpoint_latest.pth").exists()


def test_a_finished_training_runs_no_epoch_more(dataset):
    make_trainer(dataset, epochs=1).run_training()
    trainer = make_trainer(dataset, epochs=1)
    trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    called = record_calls(trainer)
    trainer.run_training()
    assert "on_train_start" in called and "on_train_end" in called and "on_epoch_start" not in called


def test_a_checkpoint_with_foreign_prefixes_and_without_mirror_axes_is_loaded(dataset):
    trainer = make_trainer(dataset)
    trainer.initialize()
    file = Path(trainer.output_folder, "c.pth")
    trainer.save_checkpoint(str(file))
    checkpoint = load_checkpoint_file(file)
    del checkpoint["inference_allowed_mirroring_axes"]
    checkpoint["network_weights"] = {
        f"module.{name}": tensor + 1 for name, tensor in checkpoint["network_weights"].items()
    }
    trainer.inference_allowed_mirroring_axes = (1,)
    trainer.load_checkpoint({**checkpoint, "something_else": 1})
    assert trainer.inference_allowed_mirroring_axes == (1,)
    state = trainer.network.state_dict()
    assert all(
        torch.equal(state[name.removeprefix("module.")], tensor)
        for name, tensor in checkpoint["network_weights"].items()
    )


def test_a_checkpoint_between_epochs_goes_on_with_the_current_epoch(dataset):
    trainer = make_trainer(dataset, current_epoch=5)
    trainer.initialize()
    trainer.save_latest_checkpoint()
    assert load_checkpoint_file(Path(trainer.output_folder, "checkpoint_latest.pth"))["current_epoch"] == 5
    assert trainer.current_epoch == 5


def test_a_trainer_finds_its_checkpoint_as_soon_as_the_epoch_has_ended(dataset):
    class Copying(nnUNetTrainer):
        def on_epoch_end(self):
            super().on_epoch_end()
            self.copied = load_checkpoint_file(Path(self.output_folder, "checkpoint_best.pth"))["current_epoch"]

    trainer = make_trainer(dataset, Copying, epochs=1)
    trainer.run_training()
    assert trainer.copied == 1


def test_a_checkpoint_keeps_the_arguments_of_a_subclass_that_are_plain_data(dataset):
    class WithOwnArguments(nnUNetTrainer):
        def __init__(
            self,
            plans,
            configuration,
            fold,
            dataset_json,
            device,
            alpha=0.3,
            sizes=(1, 2),
            helper=None,
            forgotten=1,
            *args,
            **kwargs,
        ):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.alpha, self.sizes, self.helper = alpha, sizes, object()

    trainer = make_trainer(dataset, WithOwnArguments, epochs=1)
    trainer.initialize()
    trainer.save_latest_checkpoint()
    arguments = load_checkpoint_file(Path(trainer.output_folder, "checkpoint_latest.pth"))["init_args"]
    assert (arguments["alpha"], arguments["sizes"], arguments["configuration"]) == (0.3, (1, 2), "3d_fullres")
    assert not {"helper", "forgotten", "args", "kwargs", "self"} & set(arguments)


def test_a_hook_may_jump_over_epochs(dataset):
    class Jumping(nnUNetTrainer):
        def on_epoch_end(self):
            self.logger.log("epoch_end_timestamps", 0.0, self.current_epoch)
            self.current_epoch = self.num_epochs

    trainer = make_trainer(dataset, Jumping, epochs=50)
    trainer.run_training()
    assert len(curves_of(trainer)["lrs"]) == 1


def test_nothing_is_saved_when_checkpointing_is_disabled(dataset):
    trainer = make_trainer(dataset, epochs=1, disable_checkpointing=True)
    trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_epochs_without_foreground_do_not_end_the_search_for_the_best(dataset):
    dices = iter([[math.nan] * 2, [0.5, math.nan], [0.7, 0.7]])

    class Scripted(nnUNetTrainer):
        saved = []

        def on_validation_epoch_end(self, val_outputs):
            dice = next(dices)
            mean = np.nanmean(dice) if not all(map(math.isnan, dice)) else math.nan
            self.logger.log("mean_fg_dice", mean, self.current_epoch)
            self.logger.log("dice_per_class_or_region", dice, self.current_epoch)
            self.logger.log("val_losses", 0.0, self.current_epoch)

        def save_checkpoint(self, filename):
            self.saved.append((self.current_epoch, Path(filename).name))

    trainer = make_trainer(dataset, Scripted, epochs=3)
    trainer.run_training()
    assert [epoch for epoch, name in trainer.saved if name == "checkpoint_best.pth"] == [0, 1, 2]
    assert trainer._best_ema == pytest.approx(0.9 * 0.5 + 0.1 * 0.7)


# --------------------------------------------------------------------------------------------------------- data


def test_fold_all_trains_and_validates_with_everything(dataset):
    trainer = make_trainer(dataset, fold="all")
    train, val = trainer.do_split()
    assert train is val and len(train) == 6
    assert trainer.output_folder.endswith("fold_all")


def test_cases_of_the_split_that_are_not_preprocessed_are_named(dataset, roots):
    splits = [{"train": ["case_00", "ghost"], "val": ["case_01"]}]
    (roots["nnUNet_preprocessed"] / NAME / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(FileNotFoundError, match="ghost"):
        make_trainer(dataset).run_training()


def test_batches_have_a_target_per_resolution(roots, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3))
    trainer.initialize()
    train, val = trainer.get_dataloaders()
    for loader in (train, val):
        batch = next(loader)
        assert tuple(batch["data"].shape) == (2, 1, 16, 12, 20) and batch["data"].dtype == torch.float32
        assert [tuple(target.shape) for target in batch["target"]] == [(2, 1, 16, 12, 20), (2, 1, 8, 6, 10)]
        assert len(batch["keys"]) == 2
    assert {entry for _ in range(8) for entry in next(val)["keys"]} <= set(trainer.do_split()[1])


def test_a_missing_fingerprint_says_what_to_run(dataset, roots):
    (roots["nnUNet_preprocessed"] / NAME / "dataset_fingerprint.json").unlink()
    with pytest.raises(FileNotFoundError, match="nnUNetv2_extract_fingerprint"):
        make_trainer(dataset).run_training()


@pytest.mark.slow
def test_workers_are_stopped_when_a_training_fails(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make_trainer(dataset)
    stop_at(trainer, 1)
    with pytest.raises(StoppedError):
        trainer.run_training()
    assert not trainer.dataloader_train._processes and not trainer.dataloader_val._processes


# --------------------------------------------------------------------------------------------- final validation


@pytest.mark.parametrize("trainer_class", [nnUNetTrainer, nnUNetTrainerNoDeepSupervision])
def test_the_final_validation_writes_segmentations_and_scores_and_restores_the_network(dataset, trainer_class):
    trainer = make_trainer(dataset, trainer_class, epochs=1)
    trainer.run_training()
    trainer.network.train()
    trainer.perform_actual_validation(save_probabilities=True)
    folder = Path(trainer.output_folder, "validation")
    val = trainer.do_split()[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{case}{ending}" for case in val for ending in (".nii.gz", ".npz", ".pkl")] + ["summary.json"]
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(val) and set(summary["mean"]) == {"1", "2"}
    assert trainer.network.decoder.deep_supervision is trainer.enable_deep_supervision and trainer.network.training
    assert "Mean Validation Dice:  " in Path(trainer.log_file).read_text()


@pytest.mark.slow
def test_the_next_stage_of_a_cascade_receives_segmentations_and_trains_on_them(dataset, roots):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    plans = make_plans()
    low = plans["configurations"].pop("3d_fullres")
    plans["configurations"] = {
        "3d_lowres": {**low, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_lowres", "previous_stage": "3d_lowres"},
    }
    first = nnUNetTrainer(plans, "3d_lowres", "all", make_dataset_json(), CPU)
    first.num_epochs = first.num_iterations_per_epoch = first.num_val_iterations_per_epoch = 1
    first.run_training()
    first.perform_actual_validation()
    folder = Path(first.output_folder_base, "predicted_next_stage", "3d_cascade_fullres")
    assert nnUNetDatasetBlosc2.get_identifiers(str(folder)) == first.do_split()[0]

    missing = next(folder.glob("*.b2nd"))
    kept = missing.rename(missing.with_suffix(".away").with_stem("elsewhere"))
    incomplete = nnUNetTrainer(plans, "3d_cascade_fullres", "all", make_dataset_json(), CPU)
    with pytest.raises(FileNotFoundError, match=f"1 of .* cases, such as {missing.stem}, .*train all its folds"):
        incomplete.run_training()
    kept.rename(missing)

    second = nnUNetTrainer(plans, "3d_cascade_fullres", 0, make_dataset_json(), CPU)
    second.num_epochs = second.num_iterations_per_epoch = second.num_val_iterations_per_epoch = 1
    second.run_training()
    assert second.num_input_channels == 3
    second.perform_actual_validation()
    assert Path(second.output_folder, "validation", "summary.json").is_file()


# ------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("epochs", [1, 5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000])
def test_names_of_short_trainers_say_their_length(epochs):
    name = f"nnUNetTrainer_{epochs}epoch{'s' if epochs > 1 else ''}"
    trainer = getattr(nnUNetTrainer_Xepochs, name)(make_plans(), "3d_fullres", 0, make_dataset_json(), device=CPU)
    assert trainer.num_epochs == epochs
