"""Tests of what happens when something fails in the middle of a prediction: no hang, no half-written file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny_models import write_model

from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder

MODEL_FILES = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}

# The command with a writer that stops in the middle of the file of case b.
STOPPING = """
import os, time
from pathlib import Path
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder

def write_half(self, seg, output_fname, properties):
    write_whole(self, seg, output_fname, properties)
    path = Path(output_fname)
    if path.name == "b.nii.gz":
        path.write_bytes(path.read_bytes()[:50])
        Path(os.environ["STOPPED"]).touch()
        time.sleep(10_000)

write_whole, SimpleITKIO.write_seg = SimpleITKIO.write_seg, write_half
predict_entry_point_modelfolder()
"""


def results_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - MODEL_FILES


def arguments_for(images: Path, out: Path, model: Path, *extra: object) -> list[str]:
    return [
        str(part)
        for part in (
            "-i",
            images,
            "-o",
            out,
            "-m",
            model,
            "-f",
            0,
            "-device",
            "cpu",
            "--disable_tta",
            "--disable_progress_bar",
            *extra,
        )
    ]


def predict(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_predict_from_modelfolder", *arguments_for(*arguments)])
    predict_entry_point_modelfolder()


def is_whole(path: Path) -> bool:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).size > 0


@pytest.fixture
def folders(write_images, tmp_path):
    """Return (images a, b, c; output; model)."""
    return write_images(["a", "b", "c"]), tmp_path / "out", write_model(tmp_path / "model")


@pytest.mark.parametrize("workers", [("-npp", 0, "-nps", 0), ("-npp", 2, "-nps", 1)])
def test_a_corrupt_image_is_named_and_the_others_are_predicted(folders, monkeypatch, capsys, workers):
    images, out, _ = folders
    good = (images / "b_0000.nii.gz").read_bytes()
    (images / "b_0000.nii.gz").write_bytes(good[: len(good) // 2])
    with pytest.raises(SystemExit) as stop:
        predict(monkeypatch, *folders, *workers)
    assert stop.value.code == 1
    assert "1 of 3 cases could not be predicted: b: " in capsys.readouterr().err
    assert results_in(out) == {"a.nii.gz", "c.nii.gz"}
    before = (out / "a.nii.gz").stat().st_mtime_ns
    (images / "b_0000.nii.gz").write_bytes(good)
    predict(monkeypatch, *folders, *workers, "--continue_prediction")
    assert results_in(out) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    assert (out / "a.nii.gz").stat().st_mtime_ns == before


def test_a_case_with_logits_that_are_not_finite_spares_the_others(make_predictor, write_images, tmp_path):
    predictor, cases = make_predictor(options={"use_mirroring": False}), iter("abc")

    def answer(network, inputs, logits):
        return logits * (float("nan") if next(cases) == "b" else 1)

    predictor.network.register_forward_hook(answer)
    images = write_images(["a", "b", "c"], shape=(3, 12, 12))  # one tile each
    with pytest.raises(RuntimeError, match="1 of 3 cases could not be predicted: b: .*not finite"):
        predictor.predict_from_files(str(images), str(tmp_path / "out"))
    assert results_in(tmp_path / "out") == {"a.nii.gz", "c.nii.gz"}


def test_a_missing_channel_is_named_before_anything_is_predicted(write_images, tmp_path, monkeypatch, capsys):
    images = write_images(["a", "b"], channels=2)
    (images / "b_0001.nii.gz").unlink()
    with pytest.raises(SystemExit):
        predict(monkeypatch, images, tmp_path / "out", write_model(tmp_path / "model", channels=("T1", "T2")))
    assert "case b: found channels 0000, but the model expects 0000 = T1, 0001 = T2" in capsys.readouterr().err
    assert not results_in(tmp_path / "out")


def test_each_file_without_a_channel_number_is_named(folders, monkeypatch, caplog):
    images, out, _ = folders
    for name in ("a", "b"):
        (images / f"{name}_0000.nii.gz").rename(images / f"{name}.nii.gz")
    predict(monkeypatch, *folders)
    assert all(name in caplog.text for name in ("a.nii.gz", "b.nii.gz", "_0000.nii.gz"))
    assert results_in(out) == {"c.nii.gz"}


def test_a_malicious_checkpoint_does_nothing_and_is_refused(folders, monkeypatch, capsys, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "attacked",)

    *_, model = folders
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "logging": Payload()}, path)
    with pytest.raises(SystemExit) as stop:
        predict(monkeypatch, *folders)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "would run code" in message and str(path) in message
    assert not (tmp_path / "attacked").exists()


@pytest.fixture
def stopped(folders, tmp_path):
    """Start a prediction and return (its process, its arguments) when case b is half written."""
    marker, script = tmp_path / "marker", tmp_path / "stopping.py"
    script.write_text(STOPPING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOPPED": str(marker)}
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments_for(*folders, "-npp", 1, "-nps", 1)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_while_it_writes_leaves_whole_files_only(stopped, folders, monkeypatch, kind):
    stopped.send_signal(kind)
    _, message = stopped.communicate(timeout=PATIENCE_S)
    if kind == signal.SIGINT:
        assert stopped.returncode == 130
        assert "interrupted" in message
    _, out, _ = folders
    visible = {name for name in results_in(out) if not name.startswith(".partial-")}
    assert visible == {"a.nii.gz"}
    predict(monkeypatch, *folders, "--continue_prediction")
    assert all(is_whole(out / f"{name}.nii.gz") for name in "abc")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_ends_the_run_and_leaves_no_part_of_a_file(write_images, tmp_path, monkeypatch):
    folders = (write_images(["a", "b"], shape=(60, 90, 90)), tmp_path / "out", write_model(tmp_path / "model"))
    few_tiles = ("-step_size", 1)
    script = f"""
import resource, signal
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
import sys
sys.argv[1:] = {arguments_for(*folders, *few_tiles)!r}
predict_entry_point_modelfolder()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "is the disk full" in done.stderr
    assert not results_in(folders[1])
    predict(monkeypatch, *folders, *few_tiles, "--continue_prediction")
    assert results_in(folders[1]) == {"a.nii.gz", "b.nii.gz"}
