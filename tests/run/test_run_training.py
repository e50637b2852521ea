import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from privileges import privileges_dropped
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.models.checkpoint_file import DamagedCheckpointError, load_checkpoint_file
from nnunetv2.run import run_training as module
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import build_parser, get_trainer_from_args, maybe_load_checkpoint, run_training

CPU = torch.device("cpu")
PROJECT = Path(__file__).resolve().parents[2]

# A trainer of a user, in a folder of their own.
SHORT_TRAINER = """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


    class ShortTrainer(nnUNetTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = 2
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2
"""


@pytest.fixture
def dataset(roots, monkeypatch, tmp_path) -> Path:
    """A dataset ready to be trained by ShortTrainer; the folder of the fold's results."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "trainer_of_two_epochs.py").write_text(textwrap.dedent(SHORT_TRAINER))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    return roots["nnUNet_results"] / NAME / "ShortTrainer__nnUNetPlans__3d_fullres" / "fold_0"


def train(fold=0, **options):
    run_training(998, "3d_fullres", fold, trainer_class_name="ShortTrainer", device=CPU, **options)


def read_log(fold):
    return "".join(file.read_text() for file in fold.glob("training_log_*.txt"))


def weights_in(file):
    return load_checkpoint_file(file)["network_weights"]


# -------------------------------------------------------------------------------------------------- the command


def test_the_parser_knows_the_options_of_the_reference():
    args = build_parser().parse_args(["4", "3d_fullres", "all"])
    expected = {
        "dataset_name_or_id": "4",
        "configuration": "3d_fullres",
        "fold": "all",
        "tr": "nnUNetTrainer",
        "p": "nnUNetPlans",
        "pretrained_weights": None,
        "num_gpus": 1,
        "npz": False,
        "c": False,
        "val": False,
        "val_best": False,
        "disable_checkpointing": False,
        "device": "cuda",
    }
    given = {name: value for name, value in vars(args).items() if value is not None or name in expected}
    assert given == {**expected, "no_validation": False}
    args = build_parser().parse_args(
        [
            "Dataset004_H",
            "2d",
            "1",
            "-tr",
            "T",
            "-p",
            "P",
            "-pretrained_weights",
            "f",
            "-num_gpus",
            "2",
            "--npz",
            "--c",
            "--val",
            "--val_best",
            "--disable_checkpointing",
            "-device",
            "cpu",
        ]
    )
    assert (args.tr, args.p, args.pretrained_weights, args.num_gpus, args.device) == ("T", "P", "f", 2, "cpu")
    assert args.npz and args.c and args.val and args.val_best and args.disable_checkpointing


def test_help_answers_at_once_without_torch():
    code = (
        "import sys, nnunetv2.run.run_training as m; sys.argv = ['nnUNetv2_train', '-h']\n"
        "try:\n    m.run_training_entry()\nfinally:\n"
        "    late = {'torch', 'scipy', 'pandas', 'SimpleITK', 'matplotlib', 'skimage'} & set(sys.modules)\n"
        "    assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "pretrained_weights" in done.stdout, done.stderr


def test_the_command_trains_validates_and_reports_errors_in_one_line(dataset, monkeypatch, capsys):
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the command sets these, the test takes them back
    monkeypatch.setattr("nnunetv2.utilities.device.set_torch_threads", lambda device_type: None)
    command = ["nnUNetv2_train", "998", "3d_fullres", "0", "-tr", "ShortTrainer", "-device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    module.run_training_entry()
    assert "Mean Validation Dice: " in capsys.readouterr().out
    assert (dataset / "validation" / "summary.json").is_file() and (dataset / "checkpoint_final.pth").is_file()
    monkeypatch.setattr(sys, "argv", [*command, "--c", "--val"])
    with pytest.raises(SystemExit) as stopped:
        module.run_training_entry()
    errors = capsys.readouterr().err
    assert stopped.value.code == 1 and errors.count("\n") == 1 and "use one of them" in errors


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("fold", "expected"), [("0", 0), (3, 3), ("all", "all"), ("17", 17)])
def test_folds_are_numbers_or_all(fold, expected):
    assert module.parse_fold(fold) == expected


@pytest.mark.parametrize("fold", ["first", "-1", "0.5"])
def test_other_folds_are_refused(fold):
    with pytest.raises(ValueError, match="fold is"):
        module.parse_fold(fold)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"continue_training": True, "only_run_validation": True}, AssertionError, "use one of them"),
        ({"val_with_best": True, "disable_checkpointing": True}, AssertionError, "--val_best needs checkpoint_best"),
        (
            {"no_validation": True, "only_run_validation": True},
            ValueError,
            "--no_validation leaves out what --val asks",
        ),
        ({"no_validation": True, "val_with_best": True}, ValueError, "what --val_best asks for"),
        ({"no_validation": True, "export_validation_probabilities": True}, ValueError, "what --npz asks for"),
        ({"continue_training": True, "pretrained_weights": "x"}, RuntimeError, "use one of them"),
        ({"pretrained_weights": "missing.pth"}, FileNotFoundError, "missing.pth"),
        ({"num_gpus": 0}, AssertionError, "at least one"),
    ],
)
def test_options_that_exclude_each_other_are_refused_before_anything_is_written(dataset, options, error, message):
    with pytest.raises(error, match=message):
        train(**options)
    assert not dataset.parent.exists()


def test_the_validation_of_an_unfinished_training_is_refused(dataset):
    with pytest.raises(RuntimeError, match="checkpoint_final.pth"):
        train(only_run_validation=True)
    assert not list(dataset.glob("training_log_*"))


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_folder_that_is_not_set_is_named_before_anything_else_happens(dataset, monkeypatch, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(RuntimeError, match=f"{variable} is not set.*getting-started"):
        train()


def test_missing_plans_say_what_to_run(dataset):
    with pytest.raises(FileNotFoundError, match="nnUNetv2_plan_and_preprocess"):
        run_training(998, "3d_fullres", 0, plans_identifier="OtherPlans", device=CPU)


@pytest.mark.parametrize(
    ("options", "resumes"), [({}, False), ({"continue_training": True}, True), ({"only_run_validation": True}, True)]
)
def test_only_a_fresh_training_starts_its_logging_anew(dataset, monkeypatch, options, resumes):
    asked = []

    def build(*arguments):
        asked.append(arguments[5])
        raise InterruptedError

    monkeypatch.setattr(module, "get_trainer_from_args", build)
    with pytest.raises(InterruptedError):
        train(**options)
    assert asked == [resumes]


def test_trainers_are_found_by_name_for_ids_and_names(dataset):
    for name_or_id in (998, "998", NAME):
        trainer = get_trainer_from_args(name_or_id, "3d_fullres", 0, "ShortTrainer", device=CPU)
        assert type(trainer).__name__ == "ShortTrainer" and trainer.num_epochs == 2
    assert get_trainer_from_args(998, "3d_fullres", 0, "nnUNetTrainer_5epochs", device=CPU).num_epochs == 5


def test_a_free_port_is_a_port():
    assert 1024 <= module.find_free_network_port() < 2**16


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.slow
def test_a_finished_training_repeats_its_validation_only(dataset):
    train("0")
    before = weights_in(dataset / "checkpoint_final.pth")
    (dataset / "validation" / "summary.json").unlink()
    train(continue_training=True)
    after = load_checkpoint_file(dataset / "checkpoint_final.pth")
    assert after["current_epoch"] == 2 and len(after["logging"]["lrs"]) == 2
    assert all(torch.equal(before[name], after["network_weights"][name]) for name in before)
    assert (dataset / "validation" / "summary.json").is_file()


def test_a_validation_can_be_left_out_and_made_up_for(dataset):
    train(no_validation=True)
    assert (dataset / "checkpoint_final.pth").is_file() and not (dataset / "validation").exists()
    train(only_run_validation=True)
    assert (dataset / "validation" / "summary.json").is_file()


def test_a_trainer_that_saves_no_checkpoints_by_itself_keeps_to_it(dataset, monkeypatch):
    build = module.get_trainer_from_args

    def build_without_checkpoints(*arguments):
        trainer = build(*arguments)
        trainer.disable_checkpointing = True
        return trainer

    monkeypatch.setattr(module, "get_trainer_from_args", build_without_checkpoints)
    train(no_validation=True)
    assert list(dataset.glob("training_log_*")) and not list(dataset.glob("checkpoint_*"))


def make_checkpoints(dataset, **epochs):
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    trainer.initialize()
    for name, epoch in epochs.items():
        trainer.current_epoch = epoch - 1
        trainer.save_checkpoint(str(dataset / f"checkpoint_{name}.pth"))


def test_the_checkpoint_with_most_epochs_is_continued_and_damaged_ones_are_passed_over(dataset):
    make_checkpoints(dataset, latest=5, best=7)
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    maybe_load_checkpoint(trainer, True, False)
    assert trainer.current_epoch == 7
    whole = (dataset / "checkpoint_best.pth").read_bytes()
    (dataset / "checkpoint_best.pth").write_bytes(whole[: len(whole) // 2])
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    maybe_load_checkpoint(trainer, True, False)
    assert trainer.current_epoch == 5


def test_nothing_to_continue_is_a_fresh_start(dataset, capsys):
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    maybe_load_checkpoint(trainer, True, False)
    assert trainer.current_epoch == 0 and "starts anew" in capsys.readouterr().out
    assert "starts anew" in read_log(dataset)


def test_damaged_checkpoints_alone_are_no_fresh_start(dataset):
    make_checkpoints(dataset, latest=5, best=7)
    for name in ("latest", "best"):
        file = dataset / f"checkpoint_{name}.pth"
        file.write_bytes(file.read_bytes()[:-200])
    before = {file.name: file.read_bytes() for file in dataset.glob("*.pth")}
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint_latest.pth, checkpoint_best.pth.*without --c"):
        train(continue_training=True)
    assert {file.name: file.read_bytes() for file in dataset.glob("*.pth")} == before
    assert read_log(dataset).count("is damaged") == 2


def test_checkpoints_that_cannot_be_read_are_no_fresh_start(dataset):
    make_checkpoints(dataset, latest=5)
    (dataset / "checkpoint_latest.pth").chmod(0)
    with privileges_dropped(), pytest.raises(PermissionError, match=r"checkpoint_latest.pth"):
        train(continue_training=True)
    (dataset / "checkpoint_latest.pth").chmod(0o644)
    assert load_checkpoint_file(dataset / "checkpoint_latest.pth")["current_epoch"] == 5


def test_validating_with_the_best_needs_no_final_checkpoint(dataset):
    make_checkpoints(dataset, best=1)
    train(only_run_validation=True, val_with_best=True)
    assert (dataset / "validation" / "summary.json").is_file()


# --------------------------------------------------------------------------------------------- pretrained weights


def make_network(dataset, labels):
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    return trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, labels)


def test_pretrained_weights_fill_all_but_the_layers_that_output_classes(dataset):
    make_checkpoints(dataset, final=1)
    weights = weights_in(dataset / "checkpoint_final.pth")
    network = make_network(dataset, labels=5)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_pretrained_weights(network, dataset / "checkpoint_final.pth")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, fresh[name] if ".seg_layers." in name else weights[name])


def test_pretrained_weights_of_another_network_are_refused(dataset):
    make_checkpoints(dataset, final=1)
    checkpoint = load_checkpoint_file(dataset / "checkpoint_final.pth")
    name = next(iter(checkpoint["network_weights"]))
    for change, message in (({name: torch.zeros(1)}, "has shape"), ({}, "have no tensor")):
        changed = {**{key: value for key, value in checkpoint["network_weights"].items() if key != name}, **change}
        torch.save({**checkpoint, "network_weights": changed}, dataset / "other.pth")
        with pytest.raises(AssertionError, match=message):
            load_pretrained_weights(make_network(dataset, labels=3), dataset / "other.pth")


def test_a_training_starts_from_pretrained_weights(dataset):
    make_checkpoints(dataset, best=1)
    source = weights_in(dataset / "checkpoint_best.pth")
    trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=CPU)
    maybe_load_checkpoint(trainer, False, False, str(dataset / "checkpoint_best.pth"))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.network.state_dict()[name], source[name]) and trainer.current_epoch == 0


# -------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.slow
def test_two_runs_with_a_seed_give_the_same_weights(dataset, monkeypatch):
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)

    def weights_with(seed):
        monkeypatch.setenv("nnUNet_seed", seed)
        train()
        return weights_in(dataset / "checkpoint_final.pth")

    first, again, other = weights_with("7"), weights_with("7"), weights_with("8")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("seed", ["x", "-1", str(2**32)])
def test_seeds_are_whole_numbers(monkeypatch, seed):
    from nnunetv2.training.seeding import seed_from_environment

    monkeypatch.setenv("nnUNet_seed", seed)
    with pytest.raises(ValueError, match="nnUNet_seed"):
        seed_from_environment()


# ---------------------------------------------------------------------------------------- several processes


DISTRIBUTED = """
    import os, sys
    import torch
    from torch import distributed


    def work(rank, port):
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        from nnunetv2.run.run_training import get_trainer_from_args
        torch.manual_seed(rank)
        trainer = get_trainer_from_args(998, "3d_fullres", 0, "ShortTrainer", device=torch.device("cpu"))
        trainer.run_training()
        trainer.perform_actual_validation()
        print(f"SHARE {rank} {trainer.batch_size} {trainer.oversample_foreground_percent}")
        total = torch.stack([parameter.detach().double().sum() for parameter in trainer.network.parameters()]).sum()
        sums = [torch.zeros_like(total) for _ in range(2)]
        distributed.all_gather(sums, total)
        assert sums[0] == sums[1], sums
        distributed.destroy_process_group()


    if __name__ == "__main__":
        torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


FIRST_STEP = """
import sys
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

step = nnUNetTrainer.train_step

def take_one_step(self, batch):
    step(self, batch)
    self.optimizer.state_dict()  # for a checkpoint
    slow = "torch._dynamo", "pandas", "scipy", "SimpleITK", "sklearn"
    print("loaded:", [name for name in slow if name in sys.modules])
    sys.exit()

nnUNetTrainer.train_step = take_one_step
run_training.main(["998", "3d_fullres", "0", "-tr", "ShortTrainer", "-device", "cpu"])
"""


@pytest.mark.slow
def test_a_training_starts_without_the_slow_libraries_it_does_not_need(dataset):
    finished = subprocess.run(
        [sys.executable, "-c", FIRST_STEP], check=False, timeout=PATIENCE_S, text=True, capture_output=True
    )
    assert "loaded: []" in finished.stdout, finished.stderr


@pytest.mark.slow
def test_two_processes_train_one_network_and_write_one_set_of_files(dataset, roots, tmp_path):
    script = tmp_path / "distributed_training.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, script, str(module.find_free_network_port())],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SHARE 0 1 0.0" in done.stdout and "SHARE 1 1 1.0" in done.stdout
    assert len(list(dataset.glob("training_log_*.txt"))) == 1
    assert {path.name for path in dataset.parent.iterdir()} == {
        "fold_0",
        "plans.json",
        "dataset.json",
        "dataset_fingerprint.json",
    }
    assert (dataset / "validation" / "summary.json").is_file()


@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("cuda", "1")])
def test_only_a_training_on_a_cpu_keeps_its_threads(device, expected, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    module.limit_threads(device)
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert os.environ["MKL_NUM_THREADS"] == "1"
