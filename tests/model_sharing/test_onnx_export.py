"""A trained model becomes ONNX files that answer as it does, or an error that says why not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import TinyModel, write_model

from nnunetv2.inference.onnx.metadata import decode_metadata
from nnunetv2.inference.onnx.network import OnnxNetwork
from nnunetv2.model_sharing import onnx_export
from nnunetv2.model_sharing.entry_points import export_onnx_entry
from nnunetv2.model_sharing.onnx_description import resample_without_torch
from nnunetv2.model_sharing.onnx_export import OnnxExportError, export_to_onnx
from nnunetv2.models.model_folder import load_model_folder
from nnunetv2.utilities.plug_in_kinds import TRAINER

TRAINER_MODULE = """
import torch
from torch import nn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class Network(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        {forward}

class OddTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, inputs, outputs, deep_supervision=True):
        return Network(nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, inputs, outputs, deep_supervision
        ))
"""


@pytest.fixture
def write_odd_model(tmp_path, monkeypatch):
    """Return a function that writes a model whose trainer, in a folder of the user's, builds a network of its own."""

    def write(forward: str) -> Path:
        folder = tmp_path / "trainers"
        folder.mkdir()
        (folder / "odd.py").write_text(TRAINER_MODULE.format(forward=forward))
        monkeypatch.setenv("nnUNet_extTrainer", str(folder))
        model = write_model(tmp_path / "model")
        path = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["trainer_name"] = "OddTrainer"
        checkpoint["network_weights"] = {f"inner.{k}": v for k, v in checkpoint["network_weights"].items()}
        torch.save(checkpoint, path)
        return model

    yield write
    sys.modules.pop("odd", None)


@pytest.mark.parametrize("patch_size", [(16, 12, 20), (16, 24)])
def test_the_network_answers_as_before_to_batches_of_any_size(tmp_path, patch_size):
    axes = tuple(range(len(patch_size)))
    model = TinyModel(patch_size=patch_size, spacing=(1.0,) * len(patch_size), channels=("a", "b"), mirroring_axes=axes)
    folder = write_model(tmp_path / "model", model)
    (file,) = export_to_onnx(folder, tmp_path / "onnx")
    network = load_model_folder(
        folder, 0, "checkpoint_final.pth", find_trainer=lambda name: TRAINER.base_class(), fallback=TRAINER.base_class
    ).network.eval()
    exported = OnnxNetwork(file)
    for batch in (1, 3):
        tiles = np.random.default_rng(batch).normal(size=(batch, 2, *patch_size)).astype(np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(tiles)).numpy()
        np.testing.assert_allclose(exported(tiles), expected, atol=1e-5)


def test_all_folds_are_exported_and_say_which_they_are(tmp_path):
    folder = write_model(tmp_path / "model", folds=(0, 2, "all"))
    assert [file.name for file in export_to_onnx(folder, tmp_path / "a")] == ["fold_0.onnx", "fold_2.onnx"]
    (file,) = export_to_onnx(folder, tmp_path / "b", folds=["all"])
    assert OnnxNetwork(file).description.fold == "all"


def test_metadata_hold_what_prediction_needs_and_no_more(tmp_path):
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    folder = write_model(tmp_path / "model", labels=regions, regions_class_order=(1, 2), transpose_forward=(2, 0, 1))
    dataset = folder / "dataset.json"
    dataset.write_text(dataset.read_text().replace('"numTraining": 5', '"dataset": {"Jane Doe": {}}'))
    (file,) = export_to_onnx(folder, tmp_path / "onnx")
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    found = decode_metadata({entry.key: entry.value for entry in model.metadata_props}, file)
    assert found.dataset_json["labels"] == regions and found.dataset_json["regions_class_order"] == [1, 2]
    assert found.dataset_json["file_ending"] == ".nii.gz" and found.plans["transpose_forward"] == [2, 0, 1]
    assert found.mirroring_axes == (0, 1, 2) and found.configuration == "3d_fullres"
    configuration = found.plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [2.0, 1.0, 1.0] and configuration["normalization_schemes"]
    assert b"Jane Doe" not in file.read_bytes() and "architecture" not in configuration
    assert str(tmp_path).encode() not in file.read_bytes()


def test_resampling_on_torch_becomes_the_same_on_arrays():
    from functools import partial

    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    image = np.random.default_rng(0).normal(size=(2, 9, 14, 20)).astype(np.float32)
    for options in ({"force_separate_z": False}, {"force_separate_z": None, "separate_z_anisotropy_threshold": 2}):
        planned = {"is_seg": False, "memefficient_seg_resampling": False, **options}
        keys = ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities")
        configuration = dict.fromkeys(keys, "resample_torch_fornnunet") | {f"{key}_kwargs": planned for key in keys}
        changed = resample_without_torch(configuration)
        assert changed["resampling_fn_data"] == "resample_data_or_seg_to_shape"
        grid = ((12, 10, 31), (3.0, 1.0, 1.0), (2.25, 1.4, 0.65))
        expected = partial(resample_torch_fornnunet, **planned)(image, *grid)
        found = partial(resample_data_or_seg_to_shape, **changed["resampling_fn_data_kwargs"])(image, *grid)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_resampling_on_torch_is_refused():
    planned = {"resampling_fn_data": "resample_torch_fornnunet", "resampling_fn_data_kwargs": {"mode": "bicubic"}}
    with pytest.raises(ValueError, match="resampling_fn_data, modes bicubic and nearest-exact"):
        resample_without_torch(planned)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return self.inner(torch.special.i0(x))", "operator 'aten::i0'"),
        (
            "return self.inner(x) if x.mean() > 1 else -self.inner(x)",
            r"decides in Python by what it sees: .*odd\.py, line 12",
        ),
        ("raise ValueError('no such depth')", "cannot be exported to ONNX: no such depth"),
    ],
)
def test_networks_that_onnx_cannot_express_are_refused_and_leave_no_file(write_odd_model, tmp_path, forward, message):
    with pytest.raises(OnnxExportError, match=message):
        export_to_onnx(write_odd_model(forward), tmp_path / "onnx")
    assert list((tmp_path / "onnx").iterdir()) == []


def test_a_model_without_the_fold_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"Folds with a checkpoint_final\.pth in .*: 0"):
        export_to_onnx(folder, tmp_path / "onnx", folds=["3"])
    with pytest.raises(FileNotFoundError, match="no fold in"):
        export_to_onnx(folder, tmp_path / "onnx", checkpoint_name="checkpoint_best.pth")
    with pytest.raises(FileNotFoundError, match="is not a trained model"):
        export_to_onnx(tmp_path / "nowhere", tmp_path / "onnx")
    (folder / "fold_0").rename(folder / "fold_all")
    with pytest.raises(FileNotFoundError, match=r"but that of fold all: name it \(-f all\)"):
        export_to_onnx(folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_copy_of_a_fold_is_no_fold(tmp_path):
    folder = write_model(tmp_path / "model")
    shutil.copytree(folder / "fold_0", folder / "fold_0_before")
    assert [file.name for file in export_to_onnx(folder, tmp_path / "onnx")] == ["fold_0.onnx"]


@pytest.mark.parametrize("opset", [9, 99])
def test_an_unknown_opset_is_refused(tmp_path, opset):
    with pytest.raises(ValueError, match=r"\(-opset\) must be 13 to 20, got"):
        export_to_onnx(tmp_path, tmp_path / "onnx", opset=opset)


def test_a_killed_export_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model")
    (file,) = export_to_onnx(folder, tmp_path / "onnx")
    before = file.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, "_require_same_answers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_to_onnx(folder, tmp_path / "onnx", opset=18)
    assert file.read_bytes() == before and [entry.name for entry in file.parent.iterdir()] == ["fold_0.onnx"]


def test_the_command_prints_the_files(tmp_path, monkeypatch, capsys, roots):
    model = roots["nnUNet_results"] / "Dataset998_Tiny" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_model(model)
    for number, names in enumerate((["-d", "998", "-c", "3d_fullres"], ["-m", str(model)])):
        output = str(tmp_path / f"onnx_{number}")
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_export_onnx", *names, "-o", output, "-f", "0"])
        export_onnx_entry()
        assert capsys.readouterr().out == f"{output}/fold_0.onnx\n"


@pytest.mark.parametrize("names", [[], ["-d", "998"], ["-d", "998", "-c", "2d", "-m", "model"]])
def test_a_model_is_named_in_one_way(monkeypatch, capsys, names):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_export_onnx", *names, "-o", "onnx"])
    with pytest.raises(SystemExit):
        export_onnx_entry()
    assert "name the model by -d and -c, or by its folder with -m" in capsys.readouterr().err
