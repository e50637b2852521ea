"""ONNX files predict what the model predicts, without torch, and say what is wrong with input or file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from scipy.ndimage import gaussian_filter
from tiny_models import TinyModel, write_model

from nnunetv2.inference.errors import NonFiniteLogitsError
from nnunetv2.inference.forward_budget import ForwardBudget
from nnunetv2.inference.mirroring import mirrored_mean as mirrored_mean_of_torch
from nnunetv2.inference.onnx import OnnxFileError, OnnxPredictor
from nnunetv2.inference.onnx.__main__ import main
from nnunetv2.inference.onnx.tiles import mirrored_mean, predict_image, tile_weights
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.tile_accumulation import predict_tiles
from nnunetv2.inference.tile_geometry import compute_tile_slicers
from nnunetv2.model_sharing.onnx_export import export_to_onnx

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
# Where it is asked for, torch is not found, as on a machine that has never seen it.
WITHOUT = """
import importlib.util, sys
sys.modules.update(dict.fromkeys({hidden!r}))
from nnunetv2.inference.onnx.__main__ import main
main(sys.argv[1:])
loaded = [name for name in {hidden!r} if sys.modules.get(name)]
assert not loaded, loaded
"""
NOT_NEEDED = ("torch", "acvl_utils", "batchgenerators", "blosc2", "onnx", "skimage", "sklearn", "nibabel", "tqdm")


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Return a function that writes a model that tells intensities apart, and its ONNX files."""

    def make(folds=(0,), **changes) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("model")
        write_model(folder / "model", TinyModel(folds=folds, lessons=30, **changes))
        export_to_onnx(folder / "model", folder / "onnx")
        return folder / "model", folder / "onnx"

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(folds=(0, 1))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Write two cases of smooth noise with air around it, whose sides, spacings and places are all unequal."""
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("liver_1", "liver_2")):
        write_scan(folder / f"{name}_0000.nii.gz", smooth_noise(seed, (14, 30, 26 + seed)))
    return folder


def smooth_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    voxels = 100 * gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5).astype(np.float32)
    voxels[:, :2] = 0  # preprocessing crops this
    return voxels


def write_scan(file: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.75, 1.25, 2.5))
    image.SetOrigin((-11.0, 7.0, 103.0))
    sitk.WriteImage(image, str(file))


def predict_with_torch(model: Path, images: object, output: Path, **options) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, None)
    predictor.predict_from_files(images, str(output), **options)


def share_of_equal_voxels(folder: Path, other: Path, ending: str = ".nii.gz") -> float:
    def read(file: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))

    maps = [(read(file), read(other / file.name)) for file in folder.glob(f"*{ending}")]
    assert maps and all(len(np.unique(one)) > 1 for one, _ in maps)
    return sum(np.count_nonzero(a == b) for a, b in maps) / sum(a.size for a, _ in maps)


# ------------------------------------------------------------------------------------------------------- predictions
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"folds": (0, 1), "transpose_forward": (1, 2, 0)},
        {"patch_size": (16, 24), "spacing": (1.5, 1.0), "mirroring_axes": (0, 1)},
        {"labels": REGIONS, "regions_class_order": (1, 2, 3)},
        {"patch_size": (48, 40, 40), "mirroring_axes": None},
    ],
    ids=["folds", "2d", "regions", "larger patch"],
)
def test_label_maps_and_probabilities_are_those_of_torch(make_model, scans, tmp_path, changes):
    folder, exported = make_model(**changes)
    predict_with_torch(folder, str(scans), tmp_path / "torch", save_probabilities=True)
    OnnxPredictor(exported).predict_from_files(scans, tmp_path / "onnx", save_probabilities=True)
    assert share_of_equal_voxels(tmp_path / "torch", tmp_path / "onnx") > 0.9995
    for file in (tmp_path / "torch").glob("*.npz"):
        expected, found = (np.load(place / file.name)["probabilities"] for place in (file.parent, tmp_path / "onnx"))
        np.testing.assert_allclose(found, expected, atol=5e-3)
    image, other = (sitk.ReadImage(str(tmp_path / place / "liver_1.nii.gz")) for place in ("torch", "onnx"))
    assert image.GetOrigin() == other.GetOrigin() and image.GetSpacing() == other.GetSpacing()


@pytest.mark.slow
def test_colour_photographs_are_segmented(make_model, tmp_path):
    from skimage import io

    folder, exported = make_model(
        patch_size=(32, 24), spacing=(1.0, 1.0), channels=("R", "G", "B"), file_ending=".png",
        reader="NaturalImage2DIO", mirroring_axes=(0, 1),
    )  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    colours = np.stack([smooth_noise(seed, (40, 50)) for seed in range(3)], axis=-1)
    io.imsave(str(images / "eye_0000.png"), np.clip(128 + 2 * colours, 0, 255).astype(np.uint8), check_contrast=False)
    predict_with_torch(folder, str(images), tmp_path / "torch")
    OnnxPredictor(exported).predict_from_files(images, tmp_path / "onnx")
    assert share_of_equal_voxels(tmp_path / "torch", tmp_path / "onnx", ".png") > 0.9995


@pytest.mark.slow
def test_a_cascade_continues_the_previous_stage(make_model, scans, tmp_path):
    folder, exported = make_model(previous_stage="3d_lowres")
    previous = tmp_path / "previous"
    previous.mkdir()
    for file in scans.iterdir():
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        write_scan(previous / file.name.replace("_0000", ""), (labels > 10).astype(np.uint8))
    predict_with_torch(folder, str(scans), tmp_path / "torch", folder_with_segs_from_prev_stage=str(previous))
    predictor = OnnxPredictor(exported)
    predictor.predict_from_files(scans, tmp_path / "onnx", folder_with_segs_from_prev_stage=previous)
    assert share_of_equal_voxels(tmp_path / "torch", tmp_path / "onnx") > 0.9995
    with pytest.raises(ValueError, match="this model continues 3d_lowres: predict the same images with that one first"):
        predictor.predict_from_files(scans, tmp_path / "other")


@pytest.mark.slow
def test_arrays_are_predicted_as_files_are(model, scans, tmp_path):
    predictor = OnnxPredictor(model[1])
    (from_files,) = predictor.predict_from_files([[str(scans / "liver_1_0000.nii.gz")]], None)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(scans / "liver_1_0000.nii.gz")))[None]
    from_array = predictor.predict_single_npy_array(image, {"spacing": [2.5, 1.25, 0.75]})
    np.testing.assert_array_equal(from_array, from_files)


@pytest.mark.slow
def test_folds_are_averaged(model, scans):
    _, exported = model
    logits = [
        OnnxPredictor(files).predict_logits_from_preprocessed_data(smooth_noise(3, (1, 18, 14, 22)))
        for files in (exported, exported / "fold_0.onnx", [exported / "fold_1.onnx"])
    ]
    np.testing.assert_allclose(logits[0], (logits[1].astype(np.float32) + logits[2]) / 2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("regions", [False, True])
def test_prediction_needs_neither_torch_nor_most_libraries(make_model, scans, tmp_path, regions):
    changes = {"labels": REGIONS, "regions_class_order": (1, 2, 3)} if regions else {}
    _, exported = make_model(**changes)
    output = tmp_path / "bare"
    command = [sys.executable, "-c", WITHOUT.format(hidden=NOT_NEEDED), "-m", exported, "-i", scans, "-o", output]
    done = subprocess.run([*map(str, command), "--save_probabilities"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    OnnxPredictor(exported).predict_from_files(scans, tmp_path / "full")
    assert share_of_equal_voxels(tmp_path / "full", output) == 1
    assert (output / "liver_1.npz").is_file() and (output / "liver_1.pkl").is_file()


# ------------------------------------------------------------------------------------------------------------- tiles
@pytest.mark.parametrize(
    ("spatial", "tile"),
    [((21, 10, 17), (8, 10, 6)), ((5, 11, 13), (6, 8)), ((3, 4, 5), (8, 8, 8)), ((2, 9, 5), (4, 9))],
)
@pytest.mark.parametrize("use_gaussian", [True, False])
def test_tiles_are_blended_as_by_torch(spatial, tile, use_gaussian):
    image = np.random.default_rng(0).normal(size=(2, *spatial)).astype(np.float32)
    weight = tile_weights(tile) if use_gaussian else 1.0

    def answer(tiles):  # otherwise at each place of a tile, so that wrong places and weights show
        ramp = np.linspace(1, 2, tiles[0, 0].size, dtype=np.float32).reshape(tiles.shape[2:])
        return tiles[:, [0, 1, 0]] * ramp

    found = predict_image(answer, image, classes=3, tile_size=tile, tile_step_size=0.5, weight=weight)
    padded, unpad = pad_nd_image(image, tile, "constant", {"constant_values": 0}, True)
    expected = predict_tiles(
        lambda tiles: torch.from_numpy(answer(tiles.numpy())),
        torch.from_numpy(padded),
        compute_tile_slicers(padded.shape[1:], tile, 0.5),
        classes=3,
        weight=torch.from_numpy(weight) if use_gaussian else 1.0,
        device=torch.device("cpu"),
        results_device=torch.device("cpu"),
        tiles_at_once=lambda voxels: 1,
        budget=ForwardBudget(0),
        leave_device=lambda: None,
        advance=lambda done: None,
    ).numpy()
    np.testing.assert_allclose(found, expected[(slice(None), *unpad[1:])], rtol=1e-3)


def test_mirrored_copies_are_averaged_as_by_torch():
    tiles = np.random.default_rng(0).normal(size=(2, 1, 4, 5, 6)).astype(np.float32)
    ramp = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
    found = mirrored_mean(lambda x: x * ramp, tiles, (0, 2))
    expected = mirrored_mean_of_torch(lambda x: x * torch.from_numpy(ramp), torch.from_numpy(tiles), (0, 2))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_logits_that_are_no_numbers_are_refused(value):
    image = np.zeros((1, 4, 4, 4), np.float32)
    with pytest.raises(NonFiniteLogitsError, match="not finite"):
        predict_image(lambda x: x + value, image, classes=1, tile_size=(4, 4, 4), tile_step_size=0.5, weight=1.0)


# ------------------------------------------------------------------------------------------------------------ errors
def run(capsys, *arguments: object) -> str:
    """Run the command, which fails, and return its one line."""
    with pytest.raises(SystemExit) as failed:
        main(list(map(str, arguments)))
    assert failed.value.code == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_case_with_too_few_channels_is_named(model, scans, tmp_path, capsys, make_model):
    _, exported = make_model(channels=("T1", "T2"))
    line = run(capsys, "-m", exported, "-i", scans, "-o", tmp_path / "out")
    assert "liver_1: ValueError: it has 1 channels, but the model expects 2 (T1, T2)" in line
    for name in ("liver_1_0000.nii.gz", "liver_2_0000.nii.gz", "liver_2_0001.nii.gz"):
        shutil.copy(scans / "liver_1_0000.nii.gz", tmp_path / name)
    line = run(capsys, "-m", exported, "-i", tmp_path, "-o", tmp_path / "out")
    assert "case liver_1: found channels 0000, but the model expects 0000 = T1, 0001 = T2" in line


def test_a_bad_case_costs_no_other(model, scans, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "good_0000.nii.gz").write_bytes((scans / "liver_1_0000.nii.gz").read_bytes())
    (images / "bad_0000.nii.gz").write_bytes(b"no image")
    line = run(capsys, "-m", model[1], "-i", images, "-o", tmp_path / "out")
    assert "1 of 2 cases could not be predicted: bad: " in line
    assert [file.name for file in (tmp_path / "out").glob("*.nii.gz")] == ["good.nii.gz"]


def test_images_in_another_format_are_named(model, tmp_path, capsys):
    (tmp_path / "scan_0000.nrrd").write_bytes(b"")
    line = run(capsys, "-m", model[1], "-i", tmp_path, "-o", tmp_path / "out")
    assert "files named CASE_0000.nii.gz" in line and "There are files that end in .nrrd: convert them" in line


def test_missing_files_are_named(tmp_path, capsys, model, scans):
    assert "there is no ONNX file" in run(capsys, "-m", tmp_path / "none.onnx", "-i", scans, "-o", tmp_path / "out")
    assert "holds no file that ends in .onnx" in run(capsys, "-m", scans, "-i", scans, "-o", tmp_path / "out")
    assert "there is no input folder" in run(capsys, "-m", model[1], "-i", tmp_path / "none", "-o", tmp_path / "out")


def test_files_that_are_no_models_of_ours_are_named(tmp_path, model):
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"no model")
    with pytest.raises(OnnxFileError, match=r"noise\.onnx cannot be opened: it is damaged, or no ONNX file"):
        OnnxPredictor(noise)
    half = tmp_path / "half.onnx"
    content = (model[1] / "fold_0.onnx").read_bytes()
    half.write_bytes(content[: len(content) // 2])
    with pytest.raises(OnnxFileError, match=r"half\.onnx"):
        OnnxPredictor(half)


def changed(file: Path, target: Path, change) -> Path:
    """Write an ONNX file anew with other metadata."""
    content = onnx.load(file)
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    change(content, metadata)
    del content.metadata_props[:]
    onnx.helper.set_model_props(content, metadata)
    onnx.save(content, target)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, entries: entries.clear(), "has no metadata of nnU-Net. Export the trained model with"),
        (lambda model, entries: entries.update(nnunetv2_format="2"), "has metadata of format '2', written by version"),
        (lambda model, entries: entries.pop("nnunetv2_plans"), "is damaged .nnunetv2_plans missing"),
        (lambda model, entries: entries.update(nnunetv2_dataset="{"), "nnunetv2_dataset is no JSON"),
        (lambda model, entries: entries.update(nnunetv2_dataset="[]"), "nnunetv2_dataset holds a list"),
        (lambda model, entries: entries.update(nnunetv2_dataset="{}"), "nnunetv2_dataset lacks 'labels'"),
        (lambda model, entries: entries.update(nnunetv2_configuration="2d"), "lacks the configuration '2d'"),
        (lambda model, entries: entries.update(nnunetv2_mirroring_axes="[3]"), r"nnunetv2_mirroring_axes are \[3\]"),
        (lambda model, entries: entries.update(nnunetv2_mirroring_axes="[[]]"), "nnunetv2_mirroring_axes are"),
        (
            lambda model, entries: entries.update(
                nnunetv2_dataset=entries["nnunetv2_dataset"].replace('"two": 2', '"two": 2, "three": 3')
            ),
            r"does not fit its metadata: its network turns \(1, 16, 12, 20\) into \(3, 16, 12, 20\), expected",
        ),
        (
            lambda model, entries: entries.update(
                nnunetv2_plans=entries["nnunetv2_plans"].replace("DefaultPreprocessor", "os.system")
            ),
            "expected the plain name of a class",
        ),
        (lambda model, entries: setattr(model.opset_import[0], "version", 999), "again with a smaller -opset"),
    ],
)
def test_metadata_and_operators_that_cannot_be_used_are_named(model, tmp_path, change, message):
    file = changed(model[1] / "fold_0.onnx", tmp_path / "changed.onnx", change)
    with pytest.raises((OnnxFileError, ValueError), match=message):
        OnnxPredictor(file).configuration_manager.preprocessor_class  # noqa: B018


def test_files_of_several_models_are_not_averaged(model, make_model, tmp_path):
    _, other = make_model(labels={"background": 0, "other": 1, "two": 2})
    with pytest.raises(OnnxFileError, match=r"fold_0\.onnx is of another model than"):
        OnnxPredictor([model[1] / "fold_0.onnx", other / "fold_0.onnx"])
    with pytest.raises(OnnxFileError, match="a fold is there twice"):
        OnnxPredictor([model[1] / "fold_0.onnx"] * 2)


def test_devices_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match="this onnxruntime has .* only. Install onnxruntime-gpu"):
        OnnxPredictor(model[1], device="cuda")
    with pytest.raises(ValueError, match="use one of cpu, cuda"):
        OnnxPredictor(model[1], device="tpu")


def test_finished_cases_are_kept_on_request(model, scans, tmp_path):
    (tmp_path / "liver_1.nii.gz").write_text("kept")
    names = {"-m": model[1], "-i": scans, "-o": tmp_path, "-npp": 0, "-nps": 0}
    main([*(str(word) for pair in names.items() for word in pair), "--continue_prediction"])
    assert (tmp_path / "liver_1.nii.gz").read_text() == "kept" and (tmp_path / "liver_2.nii.gz").is_file()
    assert {"plans.json", "dataset.json", "predict_from_raw_data_args.json"} <= {f.name for f in tmp_path.iterdir()}


def test_help_comes_at_once_without_libraries():
    code = """
import sys
from nnunetv2.inference.onnx.__main__ import main
try:
    main(["-h"])
finally:
    assert not {"torch", "numpy", "onnxruntime", "scipy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m nnunetv2.inference.onnx"), done.stderr


def test_errors_name_the_command_as_it_is_typed(tmp_path):
    command = [sys.executable, "-m", "nnunetv2.inference.onnx", "-m", "none", "-i", ".", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("python -m nnunetv2.inference.onnx: error: there is"), done
