import collections
import pathlib
import pickle
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2.models import checkpoint_file
from nnunetv2.models.checkpoint_file import load_checkpoint_file, rank_checkpoints, save_checkpoint_file


def make_checkpoint(epoch=3, **more):
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "network_weights": collections.OrderedDict(weight=weight, alias=weight),
        "current_epoch": epoch,
        "optimizer_state": {"state": {0: {"momentum_buffer": weight * 2}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "_best_ema": np.float32(0.5),
        "trainer_name": "nnUNetTrainer",
        "logging": {
            "mean_fg_dice": [np.float64(0.25), np.float32(0.5)],
            "dice": [[np.float32("nan")]],
            "array": [np.arange(3)],
            "lrs": [0.01],
        },
        "init_args": {"fold": 0, "device": torch.device("cpu"), "dataset_json": {"numTraining": np.int64(4)}},
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **more,
    }


def assert_is_complete(loaded):
    assert torch.equal(loaded["network_weights"]["weight"], torch.arange(6.0).reshape(2, 3))
    assert loaded["_best_ema"] == np.float32(0.5) and isinstance(loaded["_best_ema"], np.float32)
    assert loaded["logging"]["mean_fg_dice"] == [0.25, 0.5] and loaded["logging"]["array"][0].tolist() == [0, 1, 2]
    assert loaded["init_args"]["device"] == torch.device("cpu")
    assert loaded["inference_allowed_mirroring_axes"] == (0, 1, 2)


def test_a_checkpoint_returns_as_it_was_written(tmp_path):
    save_checkpoint_file(make_checkpoint(), tmp_path / "c.pth")
    loaded = load_checkpoint_file(tmp_path / "c.pth")
    assert_is_complete(loaded)
    weights = loaded["network_weights"]
    assert weights["weight"].data_ptr() == weights["alias"].data_ptr()
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_the_other_generation_of_numpy_is_read(tmp_path):
    # NumPy 1 pickled its scalars as numpy.core.multiarray.scalar, NumPy 2 as numpy._core.multiarray.scalar.
    path = tmp_path / "c.pth"
    names = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
    here = np.float32(0).__reduce__()[0].__module__.encode()
    other = names[1 - names.index(here)]

    class RenamingPickler(pickle._Pickler):
        def save_function(self, function):
            if function.__module__ != here.decode():
                return self.save_global(function)
            self.write(pickle.GLOBAL + other + b"\n" + function.__name__.encode() + b"\n")
            return self.memoize(function)

        dispatch = {**pickle._Pickler.dispatch, type(np.float32(0).__reduce__()[0]): save_function}

    torch.save(make_checkpoint(), path, pickle_module=SimpleNamespace(Pickler=RenamingPickler, __name__="p"))
    assert other in path.read_bytes() and here + b"\n" not in path.read_bytes()
    assert_is_complete(load_checkpoint_file(path))


class Payload:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("owned"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint_file(make_checkpoint(extra=Payload()), tmp_path / "c.pth")
    with pytest.raises(checkpoint_file.UntrustedCheckpointError, match="nnUNet_allow_unsafe_checkpoints=1"):
        load_checkpoint_file(tmp_path / "c.pth")
    assert not (tmp_path / "owned").exists()


def test_a_program_is_no_checkpoint(tmp_path):
    """torch.load would hand it to torch.jit.load, whose programs may read and write files."""
    path = tmp_path / "c.pth"
    save_checkpoint_file(make_checkpoint(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c/constants.pkl", pickle.dumps(()))
        archive.writestr("c/code/__torch__.py", "")
    with pytest.raises(checkpoint_file.UntrustedCheckpointError, match=r"c\.pth is a TorchScript file"):
        load_checkpoint_file(path)


def test_code_in_a_checkpoint_is_run_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint_file(make_checkpoint(extra=collections.Counter("a")), tmp_path / "c.pth")
    monkeypatch.setenv("nnUNet_allow_unsafe_checkpoints", "1")
    assert load_checkpoint_file(tmp_path / "c.pth")["extra"] == {"a": 1}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint_file(make_checkpoint(epoch=1), tmp_path / "c.pth")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint_file(make_checkpoint(epoch=2, extra=lambda: None), tmp_path / "c.pth")
    assert load_checkpoint_file(tmp_path / "c.pth")["current_epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_a_truncated_checkpoint_is_named_as_damaged(tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint_file(make_checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(checkpoint_file.DamagedCheckpointError, match="c.pth is damaged"):
        load_checkpoint_file(path)


def test_the_checkpoint_with_most_epochs_comes_first(tmp_path):
    for name, epoch in (("final", 2), ("latest", 4), ("best", 4)):
        save_checkpoint_file(make_checkpoint(epoch=epoch), tmp_path / f"checkpoint_{name}.pth")
    ranked = [path.name for path in rank_checkpoints(tmp_path)]
    assert ranked == ["checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"]


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    (tmp_path / "checkpoint_latest.pth").write_bytes(b"half a file")
    save_checkpoint_file(make_checkpoint(epoch=1), tmp_path / "checkpoint_best.pth")
    assert [path.name for path in rank_checkpoints(tmp_path)] == ["checkpoint_best.pth"]
    assert "checkpoint_latest.pth" in caplog.text


def test_only_the_latest_training_of_a_folder_counts(tmp_path):
    def save(name, epoch, began):
        moments = {"epoch_start_timestamps": [began + 9 * n for n in range(epoch)]} if began else {}
        save_checkpoint_file(make_checkpoint(epoch=epoch, logging=moments), tmp_path / f"checkpoint_{name}.pth")

    lines = []
    save("final", 9, 1000.0)  # of a training that was finished
    save("best", 3, 2000.0)  # of one that was begun anew in its folder
    assert [path.name for path in rank_checkpoints(tmp_path, lines.append)] == ["checkpoint_best.pth"]
    assert "checkpoint_final.pth, after 9 epochs" in lines[0]
    save("latest", 4, 2000.0)
    ranked = ["checkpoint_latest.pth", "checkpoint_best.pth"]
    assert [path.name for path in rank_checkpoints(tmp_path)] == ranked
    save("final", 9, None)  # does not say when it began
    assert [path.name for path in rank_checkpoints(tmp_path)] == ranked
    save("final", 9, 2000.0)
    assert [path.name for path in rank_checkpoints(tmp_path)] == ["checkpoint_final.pth", *ranked]


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(tmp_path):
    save_checkpoint_file(make_checkpoint(), tmp_path / "checkpoint_best.pth")
    (tmp_path / "checkpoint_latest.pth").symlink_to("/proc/self/mem")  # a file, and reading it is an I/O error
    if not (tmp_path / "checkpoint_latest.pth").is_file():
        pytest.skip("there is no such file here")
    with pytest.raises(OSError, match="Input/output error"):
        rank_checkpoints(tmp_path)


@pytest.mark.parametrize("length", [40, -200, -20_000])
def test_damaged_checkpoints_are_passed_over_also_where_all_code_is_trusted(tmp_path, monkeypatch, length):
    monkeypatch.setenv("nnUNet_allow_unsafe_checkpoints", "1")
    save_checkpoint_file(make_checkpoint(epoch=1), tmp_path / "checkpoint_best.pth")
    save_checkpoint_file(make_checkpoint(extra=torch.rand(10_000)), tmp_path / "checkpoint_latest.pth")
    whole = (tmp_path / "checkpoint_latest.pth").read_bytes()
    (tmp_path / "checkpoint_latest.pth").write_bytes(whole[:length])
    assert [path.name for path in rank_checkpoints(tmp_path)] == ["checkpoint_best.pth"]


def test_checkpoints_of_torch_before_archives_load_where_all_code_is_trusted(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    torch.save(make_checkpoint(epoch=7), path, _use_new_zipfile_serialization=False)
    with pytest.raises(checkpoint_file.DamagedCheckpointError, match="no complete zip archive"):
        load_checkpoint_file(path)
    monkeypatch.setenv("nnUNet_allow_unsafe_checkpoints", "1")
    assert load_checkpoint_file(path, mmap=True)["current_epoch"] == 7


@pytest.mark.parametrize("log", [None, {}, {"epoch_start_timestamps": []}, {"epoch_start_timestamps": [float("nan")]}])
def test_a_checkpoint_that_does_not_say_when_its_training_began_can_be_gone_on_with(tmp_path, log):
    save_checkpoint_file({**make_checkpoint(epoch=1), "logging": log}, tmp_path / "checkpoint_latest.pth")
    assert [path.name for path in rank_checkpoints(tmp_path)] == ["checkpoint_latest.pth"]


def test_a_damaged_pickle_is_named_as_such_also_where_all_code_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_allow_unsafe_checkpoints", "1")
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", b"\xffnonsense")
        archive.writestr("c/version", "3\n")
    with pytest.raises(checkpoint_file.DamagedCheckpointError, match=r"c\.pth is damaged"):
        load_checkpoint_file(path)


KILLED_WRITER = """
import sys, torch
from nnunetv2.models.checkpoint_file import save_checkpoint_file
torch.manual_seed(0)
for epoch in range(10_000):
    save_checkpoint_file({"current_epoch": epoch, "network_weights": {"w": torch.rand(500_000)}}, sys.argv[1])
    print(epoch, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.001, 0.004, 0.009, 0.015, 0.025])
def test_killed_while_writing_a_loadable_checkpoint_remains(tmp_path, delay_s):
    path = tmp_path / "checkpoint_latest.pth"
    with subprocess.Popen([sys.executable, "-c", KILLED_WRITER, path], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            written = int(process.stdout.readline())
        time.sleep(delay_s)
        process.kill()
        rest = process.stdout.read().split()
    written = int(rest[-1]) if rest else written
    assert load_checkpoint_file(path)["current_epoch"] in (written, written + 1)
    assert rank_checkpoints(tmp_path) == [path]


def test_a_checkpoint_cut_off_at_any_length_is_damaged_and_never_half_loaded(tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint_file(make_checkpoint(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoint_file.DamagedCheckpointError):
            load_checkpoint_file(path)
