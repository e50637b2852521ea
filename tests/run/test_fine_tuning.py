"""Trainings that start from networks with other channels, classes or depth, and say so."""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_dataset import NAME, make_configuration, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.models.checkpoint_file import CheckpointError, load_checkpoint_file
from nnunetv2.run.applied_options import prepare_trainer_
from nnunetv2.run.run_training import get_trainer_from_args, main, maybe_load_checkpoint, run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvg
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.training.options import OptionError, TrainingOptions

CPU = torch.device("cpu")
LABELS = {"background": 0, "blob": 1, "core": 2}
OTHER_LABELS = {"background": 0, "core": 1, "vessel": 2, "blob": 3}
REGIONS = {"background": 0, "blob": [1, 2], "core": [2]}


def make_network(*, dims=3, residual=False, stages=2, blocks=1, channels=("MRI",), labels=None):
    """Describe a network: its plans and its dataset.json."""
    labels = LABELS if labels is None else labels
    configuration = make_configuration(dims=dims, stages=stages)
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["n_conv_per_stage"] = [blocks] * stages
    arguments["n_conv_per_stage_decoder"] = [blocks] * (stages - 1)
    if residual:
        configuration["architecture"]["network_class_name"] = (
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        )
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    description = make_dataset_json(
        channel_names={str(number): name for number, name in enumerate(channels)}, labels=labels
    )
    if any(isinstance(value, list) for value in labels.values()):
        description["regions_class_order"] = [1, 2]
    plans = make_plans(dims=dims)
    configuration["normalization_schemes"] *= len(channels)
    configuration["use_mask_for_norm"] *= len(channels)
    plans["configurations"] = {next(iter(plans["configurations"])): configuration}
    return plans, description


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preprocessed")
    make_tiny_dataset(folder, cases=1)
    shutil.copytree(folder / NAME / "nnUNetPlans_3d_fullres", folder / NAME / "nnUNetPlans_2d")
    return folder


@pytest.fixture
def make_trainer(preprocessed, tmp_path, monkeypatch):
    """Build trainers of networks, whose log is kept."""
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    seeds = itertools.count()

    def make(trainer_class=nnUNetTrainer, *, freeze=(), **network):
        plans, description = make_network(**network)
        (configuration,) = plans["configurations"]
        trainer = trainer_class(plans, configuration, 0, description, CPU)
        trainer.freeze_patterns = tuple(freeze)
        torch.manual_seed(next(seeds))
        trainer.initialize()
        return trainer

    return make


@pytest.fixture
def save(tmp_path):
    """Save the network of a trainer as a checkpoint, with some entries replaced or left out (None)."""

    def save(trainer, **changes) -> str:
        content = {
            "network_weights": trainer.network.state_dict(),
            "init_args": trainer.my_init_kwargs,
            "trainer_name": "nnUNetTrainer",
            **changes,
        }
        file = tmp_path / "model" / "fold_0" / "old.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value for key, value in content.items() if value is not None}, file)
        return str(file)

    return save


def load(trainer, file, **options):
    """Load pretrained weights as the command does; return the lines of the log."""
    lines = []
    log = trainer.print_to_log_file
    trainer.print_to_log_file = lambda *words, **ways: (lines.append(" ".join(map(str, words))), log(*words, **ways))
    maybe_load_checkpoint(trainer, False, False, file, **options)
    return "\n".join(lines)


def state(trainer):
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def take_steps(trainer, number=2):
    """Train on noise, as an epoch does."""
    dims = len(trainer.configuration_manager.patch_size)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    torch.manual_seed(0)
    for _ in range(number):
        data = torch.randn(2, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
        regions = trainer.label_manager.has_regions
        outputs = trainer.label_manager.num_segmentation_heads
        label = torch.randint(0, 2 if regions else outputs, (2, outputs if regions else 1, *data.shape[2:])).float()
        scales = trainer._get_deep_supervision_scales()
        target = [label[(..., *[slice(None, None, round(1 / scale[0]))] * dims)] for scale in scales]
        trainer.train_step({"data": data, "target": target})


# ----------------------------------------------------------------------------------------------- each combination

CHANGES = {
    "nothing": {},
    "more channels": {"channels": ("MRI", "CT")},
    "other channels": {"channels": ("PET", "CT", "US")},
    "other classes": {"labels": OTHER_LABELS},
    "regions": {"labels": REGIONS},
    "deeper": {"stages": 3},
    "more blocks": {"blocks": 2},
    "all of it": {"channels": ("CT", "MRI"), "labels": OTHER_LABELS, "stages": 3, "blocks": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("back", [False, True], ids=["to", "from"])
@pytest.mark.parametrize(("dims", "residual"), [(2, False), (3, False), (3, True), (2, True)])
def test_every_documented_combination_trains_two_steps(make_trainer, save, dims, residual, change, back):
    kind = {"dims": dims, "residual": residual}
    networks = [kind, {**kind, **CHANGES[change]}]
    old, new = networks[::-1] if back else networks
    file = save(make_trainer(**old))
    trainer = make_trainer(**new)
    before = state(trainer)
    log = load(trainer, file)
    counted = len(dict(trainer.network.named_parameters()))
    assert sum(log.count(f"\n  {what} ") for what in ("taken", "adapted", "new")) == counted
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())
    loaded = state(trainer)
    take_steps(trainer)
    changed = [name for name, tensor in trainer.network.state_dict().items() if not torch.equal(tensor, loaded[name])]
    last = len(trainer._get_deep_supervision_scales()) - 1  # that of full resolution; others count for little
    assert f"decoder.seg_layers.{last}.weight" in changed and all(
        torch.isfinite(one).all() for one in state(trainer).values()
    )


# ---------------------------------------------------------------------------------------------------- the rules


def test_what_the_release_loads_is_loaded_as_there(make_trainer, save):
    old = make_trainer()
    for labels in (LABELS, OTHER_LABELS):
        trainer = make_trainer(labels=labels)
        before = state(trainer)
        load(trainer, save(old))
        for name, tensor in trainer.network.state_dict().items():
            expected = before[name] if ".seg_layers." in name else old.network.state_dict()[name]
            assert torch.equal(tensor, expected)


def test_classes_keep_their_weights_by_name(make_trainer, save):
    old, trainer = make_trainer(), make_trainer(labels=OTHER_LABELS)
    before = state(trainer)
    log = load(trainer, save(old), pretrained_heads="by_name")
    for part in ("weight", "bias"):
        name = f"decoder.seg_layers.0.{part}"
        source, loaded = old.network.state_dict()[name], trainer.network.state_dict()[name]
        assert torch.equal(loaded[[0, 1, 3]], source[[0, 2, 1]]) and torch.equal(loaded[2], before[name][2])
        assert f"adapted   {name}: classes 'background', 'core', 'blob' as they were, 'vessel' anew" in log


def test_regions_keep_their_weights_by_name_and_labels_do_not_become_regions(make_trainer, save):
    old = make_trainer(labels=REGIONS)
    trainer = make_trainer(labels={"background": 0, "core": [2], "blob": [1, 2]})
    load(trainer, save(old), pretrained_heads="by_name")
    bias = "decoder.seg_layers.0.bias"
    assert torch.equal(trainer.network.state_dict()[bias], old.network.state_dict()[bias].flip(0))
    assert "labels and regions are told apart" in load(make_trainer(), save(old), pretrained_heads="by_name")


@pytest.mark.parametrize("residual", [False, True])
def test_a_network_with_a_further_channel_begins_with_what_it_knew(make_trainer, save, residual):
    old, trainer = make_trainer(residual=residual), make_trainer(channels=("CT", "MRI"), residual=residual)
    log = load(trainer, save(old))
    assert ": channels 'MRI' as they were, 'CT' from zero" in log
    image = torch.randn(1, 1, 16, 12, 20)
    old.network.eval(), trainer.network.eval()
    with torch.no_grad():
        known, with_other = old.network(image)[0], trainer.network(torch.cat([torch.randn_like(image), image], 1))[0]
    torch.testing.assert_close(with_other, known)


def test_channels_of_other_names_share_what_there_was(make_trainer, save):
    old, trainer = make_trainer(channels=("A", "B", "C")), make_trainer(channels=("D", "E"))
    log = load(trainer, save(old))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    loaded, source = trainer.network.state_dict()[name], old.network.state_dict()[name]
    torch.testing.assert_close(loaded, source.sum(1, keepdim=True).expand_as(loaded) / 2)
    assert f"adapted   {name}: each of 2 channels is the sum of the 3 old ones, divided by 2" in log


def test_as_many_channels_are_taken_in_their_order_with_a_note(make_trainer, save):
    old, trainer = make_trainer(channels=("A", "B")), make_trainer(channels=("B", "A"))
    log = load(trainer, save(old))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.network.state_dict()[name], old.network.state_dict()[name])
    assert "NOTE: its channels are 'A', 'B', those here 'B', 'A'" in log


@pytest.mark.parametrize(("old_stages", "new_stages"), [(3, 4), (4, 3)])
def test_stages_of_the_same_resolution_are_taken(make_trainer, save, old_stages, new_stages):
    old, trainer = make_trainer(stages=old_stages), make_trainer(stages=new_stages)
    log = load(trainer, save(old))
    weights, source = trainer.network.state_dict(), old.network.state_dict()
    assert torch.equal(
        weights["encoder.stages.2.0.convs.0.conv.weight"], source["encoder.stages.2.0.convs.0.conv.weight"]
    )
    for part in ("stages.{}.convs.0.conv.weight", "transpconvs.{}.weight", "seg_layers.{}.weight"):
        last, old_last = (f"decoder.{part.format(stages - 2)}" for stages in (new_stages, old_stages))
        assert torch.equal(weights[last], source[old_last])
    if new_stages > old_stages:
        assert "new       encoder.stages.3.0.convs.0.conv.weight: the other network has no such stage" in log
        assert "new       decoder.transpconvs.0.weight" in log
    else:
        assert "left out  encoder.stages.3.0.convs.0.conv.weight" in log and "left out  decoder.transpconvs.0" in log


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("stages", [2, 3])
def test_prefixes_of_wrappers_make_no_difference(make_trainer, save, prefix, stages):
    old, trainer = make_trainer(), make_trainer(stages=stages)
    weights = {prefix + name: tensor for name, tensor in old.network.state_dict().items()}
    log = load(trainer, save(old, network_weights=weights))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.network.state_dict()[name], old.network.state_dict()[name])
    assert f"taken     {name}" in log and " 0 of the file left out" in log


def test_names_come_from_the_model_folder_if_the_checkpoint_has_none(make_trainer, save, tmp_path):
    old = make_trainer()
    file = save(old, init_args=None)
    assert "the names of the old classes are not known" in load(make_trainer(channels=("MRI", "CT")), file)
    (tmp_path / "model" / "dataset.json").write_text(json.dumps(make_dataset_json()))
    log = load(make_trainer(channels=("MRI", "CT")), file)
    assert "'CT' from zero" in log and "taken     decoder.seg_layers.0.weight" in log


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"dims": 2}, {}, r"encoder.stages.0.0.convs.0.conv.weight has shape \(4, 1, 3, 3\), the network needs"),
        ({"residual": True}, {}, "there is no tensor encoder.stages.0.0.convs.0.conv.weight"),
        ({}, {"residual": True}, "there is no tensor encoder.stem.convs.0.conv.weight"),
    ],
)
def test_networks_without_a_rule_are_refused_and_left_alone(make_trainer, save, old, new, message):
    file, trainer = save(make_trainer(**old)), make_trainer(**new)
    before = state(trainer)
    with pytest.raises(ValueError, match=message) as error:
        load(trainer, file)
    assert "old.pth" in str(error.value) and "train with the plans" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())


def test_kernels_that_differ_are_refused(make_trainer, save):
    old, trainer = make_trainer(channels=("MRI", "CT")), make_trainer()
    weights = old.network.state_dict()
    for name in list(weights):
        if name.endswith("stages.1.0.convs.0.conv.weight") or "stages.1.0.convs.0.all_modules.0.weight" in name:
            weights[name] = weights[name][..., :1]
    with pytest.raises(ValueError, match=r"encoder.stages.1.0.convs.0.conv.weight has shape \(8, 4, 3, 3, 1\)"):
        load(trainer, save(old, network_weights=weights))


@pytest.mark.parametrize("content", [{"weights": 1}, {"network_weights": {"a": 1}}, {"network_weights": [1]}])
def test_a_file_without_weights_is_refused_by_name(make_trainer, tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd.pth holds no weights of a network"):
        load(make_trainer(), str(tmp_path / "odd.pth"))


def test_a_senseless_description_is_named(make_trainer, save):
    old = make_trainer()
    file = save(old, init_args={"dataset_json": {"labels": {"blob": 1}}})
    with pytest.raises(ValueError, match=r"old.pth: the dataset.json of the pretrained weights makes no sense"):
        load(make_trainer(channels=("MRI", "CT")), file)


# ----------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_frozen_encoder_stays_as_it_was_loaded(make_trainer, save, dims, residual):
    kind = {"dims": dims, "residual": residual}
    file = save(make_trainer(**kind))
    trainer = make_trainer(freeze=["encoder"], channels=("MRI", "CT"), **kind)
    load(trainer, file)
    before = state(trainer)
    take_steps(trainer)
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder.")
        assert (parameter.grad is None) == name.startswith("encoder.")


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerAdam", "nnUNetTrainerVanillaAdam"])
def test_no_optimizer_touches_what_is_frozen(make_trainer, name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainer = make_trainer(recursive_find_trainer_class_by_name(name), freeze=["decoder.stages"])
    trainer.weight_decay = 0.1
    before = state(trainer)
    take_steps(trainer, 3)
    assert all(torch.equal(one, before[key]) for key, one in state(trainer).items() if key.startswith("decoder.stages"))


def test_frozen_batch_normalization_keeps_its_statistics(make_trainer):
    trainer = make_trainer(nnUNetTrainerBN, freeze=["encoder.stages.0"])
    before = state(trainer)
    take_steps(trainer)
    for name, tensor in state(trainer).items():
        if name.endswith("running_mean") and not name.startswith("decoder.encoder"):
            assert torch.equal(tensor, before[name]) == name.startswith("encoder.stages.0.")


# ------------------------------------------------------------------------------------------------- the command

SHORT_TRAINERS = """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup


    class ShortTrainer(nnUNetTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = 1
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1


    class ShortWarmup(nnUNetTrainer_warmup):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.warmup_duration_whole_net = 2, 1
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1


    class OwnPatterns(ShortTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.freeze_patterns = ("encoder",)


    class OwnInitialize(ShortTrainer):
        def initialize(self):
            patterns, self.freeze_patterns = self.freeze_patterns, ()
            super().initialize()
            self.freeze_patterns = patterns
"""


@pytest.fixture
def results(roots, monkeypatch, tmp_path) -> Path:
    """A dataset ready to be trained by trainers of a user; its folder of results."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "short_trainers_for_freezing.py").write_text(textwrap.dedent(SHORT_TRAINERS))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    return roots["nnUNet_results"] / NAME


def train(trainer="ShortTrainer", **options):
    run_training(998, "3d_fullres", 0, trainer_class_name=trainer, device=CPU, **options)


def frozen(trainer):
    return sorted(name for name, one in trainer.network.named_parameters() if not one.requires_grad)


def resume(name, **options):
    """Bring a trainer to where the command would go on."""
    trainer = get_trainer_from_args(998, "3d_fullres", 0, name, continue_training=True, device=CPU)
    prepare_trainer_(trainer, TrainingOptions(**options), continue_training=True)
    maybe_load_checkpoint(trainer, True, False)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ShortTrainer", "ShortWarmup", "OwnInitialize"])
def test_what_is_frozen_is_kept_and_taken_over(results, trainer):
    patterns = ("encoder.stages.0", "regex:norm")
    train(trainer, options=TrainingOptions(freeze=patterns))
    fold = results / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    assert load_checkpoint_file(fold / "checkpoint_final.pth")["training_options"] == {"freeze": patterns}
    assert json.loads((fold / "debug.json").read_text())["freeze_patterns"] == str(patterns)
    resumed = frozen(resume(trainer))
    assert resumed and all("norm" in name or name.startswith("encoder.stages.0") for name in resumed)
    with pytest.raises(
        OptionError, match="finished .* contradicts --freeze decoder .trained with encoder.stages.0 --freeze"
    ):
        train(trainer, continue_training=True, options=TrainingOptions(freeze=("decoder",)))
    train(trainer, continue_training=True, options=TrainingOptions(freeze=patterns))


def test_an_unfinished_training_may_go_on_with_all_layers(results):
    fold = results / "ShortTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    unfinished = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    prepare_trainer_(unfinished, TrainingOptions(epochs=2, freeze=("encoder",)), continue_training=False)
    unfinished.save_checkpoint(str(fold / "checkpoint_latest.pth"))
    assert len(frozen(resume("ShortTrainer"))) == 16 and frozen(resume("ShortTrainer", freeze=())) == []
    train(continue_training=True, options=TrainingOptions(freeze=()))
    assert load_checkpoint_file(fold / "checkpoint_final.pth")["training_options"] == {"epochs": 2, "freeze": ()}


def test_a_trainer_may_choose_what_is_frozen(results):
    train("OwnPatterns")
    assert len(frozen(resume("OwnPatterns"))) == 16


def test_a_federated_trainer_freezes_nothing(make_trainer):
    with pytest.raises(OptionError, match="nnUNetTrainerAsymFedAvg freezes nothing: all sites train"):
        make_trainer(nnUNetTrainerAsymFedAvg, freeze=["encoder"])


def test_a_training_without_frozen_parts_says_nothing_of_them(results):
    train()
    fold = results / "ShortTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert "training_options" not in load_checkpoint_file(fold / "checkpoint_final.pth")
    with pytest.raises(OptionError, match="contradicts --freeze encoder .trained with nothing"):
        train(continue_training=True, options=TrainingOptions(freeze=("encoder",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": TrainingOptions(pretrained_heads="by_name")}, "needs -pretrained_weights"),
        ({"options": TrainingOptions(freeze=("encoder",)), "only_run_validation": True}, "--val only validates"),
        (
            {"options": TrainingOptions(freeze=("encoder",)), "trainer": "nnUNetTrainerAsymFedAvg"},
            "--freeze does not go with nnUNetTrainerAsymFedAvg: all sites train",
        ),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused_before_anything_is_written(results, options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)
    assert not results.exists()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("encodr", "no parameter of the network has such a name; they begin with encoder, decoder"),
        ("*", "all parameters would be frozen"),
        ("regex:(", "no regular expression"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(make_trainer, pattern, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(freeze=[pattern])


def test_the_command_hands_its_options_on(results, monkeypatch):
    given = {}
    monkeypatch.setattr("nnunetv2.run.run_training.run_training", lambda *_, **options: given.update(options))
    monkeypatch.setattr("nnunetv2.utilities.device.set_torch_threads", lambda device_type: None)
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    command = ["998", "3d_fullres", "0", "-device", "cpu"]
    main([*command, "--freeze", "encoder", "--freeze", "decoder.stages.*", "--pretrained_heads", "new"])
    assert given["options"] == TrainingOptions(freeze=("encoder", "decoder.stages.*"), pretrained_heads="new")
    main([*command, "--freeze", "nothing"])
    assert given["options"] == TrainingOptions(freeze=())
    with pytest.raises(OptionError, match="goes with no other --freeze"):
        main([*command, "--freeze", "nothing", "--freeze", "encoder"])


def test_federated_trainers_take_adapted_weights(make_trainer, save):
    trainer = make_trainer(nnUNetTrainerAsymFedAvg, channels=("MRI", "CT"))
    file = save(make_trainer())
    assert "'CT' from zero" in load(trainer, file) and trainer.pretrained_weights == file


@pytest.mark.slow
def test_several_processes_train_what_is_not_frozen(results, monkeypatch):
    train(num_gpus=2, options=TrainingOptions(freeze=("encoder",)))
    fold = results / "ShortTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert load_checkpoint_file(fold / "checkpoint_final.pth")["training_options"] == {"freeze": ("encoder",)}
