"""Bad input, fault by fault: the real command refuses it with one message that names the file and the remedy, and
leaves no trace on the disk.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from planning_scans import write_nifti
from privileges import privileges_dropped
from skimage import io

from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entrypoints

SHAPE, SPACING = (6, 8, 10), (3.0, 1.5, 1.0)
LABELS = {"background": 0, "organ": 1, "tumour": 2}


# -------------------------------------------------------------------------------------------------- the command


@dataclass
class Outcome:
    """What a person sees of a refused command."""

    message: str
    table: str


@pytest.fixture
def refuse(monkeypatch, capsys, roots) -> Callable[..., Outcome]:
    """Run nnUNetv2_plan_and_preprocess, assert that it is refused with one line and writes nothing."""

    def run(*arguments: str, dataset: str = "2", check: bool = True) -> Outcome:
        options = ["--verify_dataset_integrity"] if check else []
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "nnUNetv2_plan_and_preprocess",
                "-d",
                dataset,
                "-np",
                "1",
                "-npfp",
                "2",
                "--no_pbar",
                *options,
                *arguments,
            ],
        )
        before = snapshot(roots)
        with pytest.raises(SystemExit) as caught:
            entrypoints.plan_and_preprocess_entry()
        captured = capsys.readouterr()
        assert caught.value.code == 1
        assert snapshot(roots) == before
        lines = [line for line in captured.err.splitlines() if line.startswith("nnUNetv2_plan_and_preprocess: error:")]
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        return Outcome(lines[0], captured.out)

    return run


def snapshot(roots) -> dict[str, object]:
    """Return every file below the three roots with its content, and every folder."""
    tree = {}
    for root in {path.parent for path in roots.values()}:
        for path in sorted(root.rglob("*")):
            tree[str(path)] = content_of(path)
    return tree


def content_of(path: Path) -> object:
    try:
        return path.read_bytes() if path.is_file() else path.is_dir()
    except PermissionError:
        return path.stat().st_size


# -------------------------------------------------------------------------------------------------- the datasets


@pytest.fixture
def dataset(make_scans, make_case) -> Path:
    """Three sound cases of two channels."""
    return make_scans({f"case_{i}": make_case(i, num_channels=2) for i in range(3)}, channels=["T1", "T2"])


def image_of(folder: Path, case: int = 1, channel: int = 0) -> Path:
    return folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz"


def label_of(folder: Path, case: int = 1) -> Path:
    return folder / "labelsTr" / f"case_{case}.nii.gz"


def change_json(folder: Path, *, remove: str | None = None, **changes: object) -> None:
    file = folder / "dataset.json"
    content = {**json.loads(file.read_text()), **changes}
    content.pop(remove, None)
    file.write_text(json.dumps(content))


def change_header(file: Path, **changes: object) -> None:
    image = sitk.ReadImage(str(file))
    for name, value in changes.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(file))


def write_values(file: Path, **values: object) -> None:
    """Write a file of the usual geometry with given values at single voxels."""
    array = np.ones(SHAPE, dtype=values.pop("dtype", np.float32))
    for position, value in enumerate(values.values()):
        array[2, 3, position] = value
    write_nifti(array, file, SPACING)


def damage(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def swap_channels_in_list(folder: Path) -> None:
    change_json(
        folder,
        dataset={
            f"case_{i}": {
                "images": [f"imagesTr/case_{i}_000{c}.nii.gz" for c in ((1, 0) if i == 1 else (0, 1))],
                "label": f"labelsTr/case_{i}.nii.gz",
            }
            for i in range(3)
        },
    )


def list_files(folder: Path, **of_case_1: object) -> None:
    entries = {
        f"case_{i}": {
            "images": [f"imagesTr/case_{i}_000{c}.nii.gz" for c in (0, 1)],
            "label": f"labelsTr/case_{i}.nii.gz",
        }
        for i in range(3)
    }
    entries["case_1"].update(of_case_1)
    change_json(folder, dataset=entries)


def write_series(file: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((10, 8, 6, 5), np.float32), np.diag([1, 1.5, 3, 1])), file)


def shear(file: Path) -> None:
    affine = np.array([[1, 0.4, 0, 0], [0, 1.5, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.ones((10, 8, 6), np.float32), affine), file)


def rename_all(folder: Path, ending: str) -> None:
    for file in folder.glob("*Tr/*"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ending)))


def make_labels_empty(folder: Path) -> None:
    for i in range(3):
        write_nifti(np.zeros(SHAPE, np.uint8), label_of(folder, i), SPACING)


@dataclass(frozen=True)
class Fault:
    """How to spoil a sound dataset, and what the message must say: where, and what to do."""

    spoil: Callable[[Path], object]
    names: tuple[str, ...]
    remedy: str


def fault(spoil: Callable[[Path], object], *names: str, remedy: str) -> Fault:
    return Fault(spoil, names, remedy)


FILES = {
    "last channel missing": fault(
        lambda d: image_of(d, channel=1).unlink(), "case_1", "imagesTr/case_1_0001.nii.gz", remedy="add the file"
    ),
    "first channel missing": fault(
        lambda d: image_of(d).unlink(), "case_1", "imagesTr/case_1_0000.nii.gz", remedy="add the file"
    ),
    "a channel too many": fault(
        lambda d: shutil.copy(image_of(d), image_of(d, channel=2)), "case_1", "found 3", remedy="remove those too many"
    ),
    "image without label": fault(
        lambda d: label_of(d).unlink(), "case_1", "labelsTr/case_1.nii.gz", "no label", remedy="add the file"
    ),
    "label without image": fault(
        lambda d: shutil.copy(label_of(d), label_of(d, 7)),
        "case_7",
        "labelsTr/case_7.nii.gz",
        "no image",
        remedy="add its images",
    ),
    "image without channel number": fault(
        lambda d: shutil.copy(image_of(d), d / "imagesTr" / "case_1.nii.gz"),
        "imagesTr/case_1.nii.gz",
        "CASE_0000.nii.gz",
        remedy="rename",
    ),
    "second ending": fault(
        lambda d: (d / "imagesTr" / "case_9_0000.nrrd").write_bytes(b"x"),
        "imagesTr/case_9_0000.nrrd",
        remedy="rename or convert",
    ),
    "hidden file that looks like an image": fault(
        lambda d: (d / "imagesTr" / "._case_1.nii.gz").write_bytes(b"x"), "imagesTr/._case_1.nii.gz", remedy="delete"
    ),
    "empty image": fault(
        lambda d: image_of(d).write_bytes(b""), "imagesTr/case_1_0000.nii.gz", "0 bytes", remedy="copy the file again"
    ),
    "empty label": fault(
        lambda d: label_of(d).write_bytes(b""), "labelsTr/case_1.nii.gz", "0 bytes", remedy="copy the file again"
    ),
    "truncated image": fault(
        lambda d: damage(image_of(d), lambda content: content[: len(content) // 2]),
        "imagesTr/case_1_0000.nii.gz",
        "damaged file",
        remedy="copy the file again",
    ),
    "truncated label": fault(
        lambda d: damage(label_of(d), lambda content: content[:-12]),
        "labelsTr/case_1.nii.gz",
        "damaged file",
        remedy="copy the file again",
    ),
    "header announces more than there is": fault(
        lambda d: damage(image_of(d), lambda content: gzip.compress(gzip.decompress(content)[:900])),
        "imagesTr/case_1_0000.nii.gz",
        "cut short",
        remedy="replace it",
    ),
    "flipped bits": fault(
        lambda d: damage(image_of(d), flip), "imagesTr/case_1_0000.nii.gz", "damaged file", remedy="copy the file again"
    ),
    "no image at all": fault(
        lambda d: image_of(d).write_bytes(b"no image"),
        "imagesTr/case_1_0000.nii.gz",
        "cannot be read",
        remedy="open the file in a viewer",
    ),
    "link to nowhere": fault(
        lambda d: (label_of(d).unlink(), label_of(d).symlink_to(d / "gone.nii.gz")),
        "labelsTr/case_1.nii.gz",
        "missing",
        remedy="add the file",
    ),
    "a folder in place of a label": fault(
        lambda d: (label_of(d).unlink(), label_of(d).mkdir()),
        "labelsTr/case_1.nii.gz",
        "missing",
        remedy="add the file",
    ),
}

VOXELS = {
    "image of another shape": fault(
        lambda d: write_nifti(np.ones((6, 8, 11), np.float32), image_of(d, channel=1), SPACING),
        "case_1_0001.nii.gz",
        "6 x 8 x 11",
        "6 x 8 x 10",
        remedy="resample",
    ),
    "label of another shape": fault(
        lambda d: write_nifti(np.ones((7, 8, 10), np.uint8), label_of(d), SPACING),
        "labelsTr/case_1.nii.gz",
        "7 x 8 x 10",
        "6 x 8 x 10",
        remedy="resample",
    ),
    "image of another spacing": fault(
        lambda d: change_header(image_of(d, channel=1), Spacing=(1.0, 1.5, 3.5)),
        "case_1_0001.nii.gz",
        "3.5, 1.5, 1 mm",
        "3, 1.5, 1 mm",
        remedy="write it into the other file",
    ),
    "label of another spacing": fault(
        lambda d: change_header(label_of(d), Spacing=(2.0, 1.5, 3.0)),
        "labelsTr/case_1.nii.gz",
        "3, 1.5, 2 mm",
        remedy="write it into the other file",
    ),
    "image of another origin": fault(
        lambda d: change_header(image_of(d, channel=1), Origin=(0.0, 9.0, 0.0)),
        "case_1_0001.nii.gz",
        "origin",
        "off by up to 9 mm",
        remedy="overlay both in a viewer",
    ),
    "label of another origin": fault(
        lambda d: change_header(label_of(d), Origin=(5.0, 0.0, 0.0)),
        "labelsTr/case_1.nii.gz",
        "origin",
        "5, 0, 0",
        remedy="overlay both in a viewer",
    ),
    "label of another direction": fault(
        lambda d: change_header(label_of(d), Direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
        "labelsTr/case_1.nii.gz",
        "direction",
        remedy="overlay both in a viewer",
    ),
    "image of another direction": fault(
        lambda d: change_header(image_of(d, channel=1), Direction=(0, 1, 0, 1, 0, 0, 0, 0, -1)),
        "case_1_0001.nii.gz",
        "direction",
        remedy="overlay both in a viewer",
    ),
    "NaN": fault(
        lambda d: write_values(image_of(d), a=np.nan),
        "imagesTr/case_1_0000.nii.gz",
        "1 voxels",
        remedy="numpy.nan_to_num",
    ),
    "infinity": fault(
        lambda d: write_values(image_of(d), a=np.inf, b=-np.inf, dtype=np.float64),
        "imagesTr/case_1_0000.nii.gz",
        "2 voxels",
        remedy="numpy.nan_to_num",
    ),
    "NaN in a label": fault(
        lambda d: write_values(label_of(d), a=np.nan), "labelsTr/case_1.nii.gz", "1 voxels", remedy="numpy.nan_to_num"
    ),
    "series (4D)": fault(
        lambda d: (
            write_series(image_of(d)),
            image_of(d, channel=1).unlink(),
            change_json(d, channel_names={"0": "MR"}),
            image_of(d, 0, 1).unlink(),
            image_of(d, 2, 1).unlink(),
        ),
        "case_1_0000.nii.gz",
        "series (4D)",
        "5 volumes",
        remedy="split time points",
    ),
    "label as a series (4D)": fault(
        lambda d: write_series(label_of(d)), "labelsTr/case_1.nii.gz", "5 channels", remedy="open the file in a viewer"
    ),
    "sheared axes": fault(
        lambda d: shear(image_of(d)), "imagesTr/case_1_0000.nii.gz", "not at right angles", remedy="NibabelIO"
    ),
    "colours in NIfTI": fault(
        lambda d: sitk.WriteImage(
            sitk.GetImageFromArray(np.ones((*SHAPE, 3), np.uint8), isVector=True), str(image_of(d))
        ),
        "imagesTr/case_1_0000.nii.gz",
        "3 values per voxel",
        remedy="Store each component",
    ),
    "unknown label": fault(
        lambda d: write_values(label_of(d), a=3, b=7, dtype=np.uint8),
        "labelsTr/case_1.nii.gz",
        "found 3, 7",
        "expected 0, 1, 2",
        remedy="name these values",
    ),
    "negative label": fault(
        lambda d: write_values(label_of(d), a=-1, dtype=np.int16),
        "labelsTr/case_1.nii.gz",
        "found -1",
        remedy="correct the label file",
    ),
    "fractional label": fault(
        lambda d: write_values(label_of(d), a=1.5),
        "labelsTr/case_1.nii.gz",
        "found 1.5",
        remedy="correct the label file",
    ),
    "no foreground in any case": fault(make_labels_empty, "labelsTr", "background only", remedy="nothing to learn"),
}

JSON = {
    "no dataset.json": fault(
        lambda d: (d / "dataset.json").unlink(), "Dataset002_Scans has no dataset.json", remedy="write one"
    ),
    "broken JSON": fault(
        lambda d: (d / "dataset.json").write_text('{"labels": {'),
        "dataset.json is not valid JSON",
        remedy="correct the file",
    ),
    "a list instead of an object": fault(
        lambda d: (d / "dataset.json").write_text("[]"), "dataset.json", "a list", remedy="correct the file"
    ),
    "not UTF-8": fault(
        lambda d: (d / "dataset.json").write_bytes('{"name": "Müller"}'.encode("latin1")),
        "dataset.json is not encoded in UTF-8",
        remedy="save it as UTF-8",
    ),
    "a key twice": fault(
        lambda d: damage(d / "dataset.json", lambda content: content.replace(b'"tumour"', b'"organ"')),
        "dataset.json",
        "'organ' occurs twice",
        remedy="keep one of them",
    ),
    "no imagesTr": fault(lambda d: (d / "imagesTr").rename(d / "images"), "has no folder imagesTr", remedy="create it"),
    "no labelsTr": fault(lambda d: (d / "labelsTr").rename(d / "labels"), "has no folder labelsTr", remedy="create it"),
    **{
        f"no {key}": fault(
            lambda d, key=key: change_json(d, remove=key), "dataset.json", f"lacks {key}", remedy="add what is missing"
        )
        for key in ("labels", "channel_names", "numTraining", "file_ending")
    },
    "labels as a list": fault(
        lambda d: change_json(d, labels=["background", "organ"]),
        "'labels' of dataset.json",
        "a list",
        remedy='"background": 0',
    ),
    "labels the old way round": fault(
        lambda d: change_json(d, labels={"0": "background", "1": "organ"}),
        "'labels' of dataset.json",
        "nnU-Net 1",
        remedy="turn the entries round",
    ),
    "label as text": fault(
        lambda d: change_json(d, labels={**LABELS, "tumour": "2"}), "'tumour': \"2\"", remedy="without quotes"
    ),
    "label as a fraction": fault(
        lambda d: change_json(d, labels={**LABELS, "tumour": 2.0}), "'tumour': 2.0", remedy="whole numbers"
    ),
    "label below 0": fault(
        lambda d: change_json(d, labels={**LABELS, "tumour": -2}), "'tumour': -2", remedy="whole numbers"
    ),
    "labels with a gap": fault(
        lambda d: change_json(d, labels={**LABELS, "tumour": 3}), "1 is followed by 3", remedy="without gaps"
    ),
    "background is not 0": fault(
        lambda d: change_json(d, labels={"background": 1, "organ": 0, "tumour": 2}),
        "'background': 1",
        remedy="label the background 0",
    ),
    "no background": fault(
        lambda d: change_json(d, labels={"organ": 1, "tumour": 2}), "no background", remedy="label the background 0"
    ),
    "ignore label is not the highest": fault(
        lambda d: change_json(d, labels={"background": 0, "ignore": 1, "tumour": 2}),
        "ignore label must be the highest label plus one, 3; it is 1",
        remedy="ignore last",
    ),
    "ignore label as a list": fault(
        lambda d: change_json(d, labels={**LABELS, "ignore": [3]}), "'ignore': [3]", remedy="as a number"
    ),
    "regions without an order": fault(
        lambda d: change_json(d, labels={"background": 0, "whole": [1, 2], "core": 2}),
        "regions_class_order",
        remedy="one label for each of whole, core",
    ),
    "order of regions too short": fault(
        lambda d: change_json(d, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1]),
        "regions_class_order has 1 entries, but there are 2 regions",
        remedy="one label for each of whole, core",
    ),
    "order of regions as text": fault(
        lambda d: change_json(d, regions_class_order="1, 2"), "'regions_class_order'", '"1, 2"', remedy="[1, 2, 3]"
    ),
    "channels out of order": fault(
        lambda d: change_json(d, channel_names={"1": "T2", "0": "T1"}),
        "'channel_names' of dataset.json",
        "the order 1, 0",
        remedy="in the order of the",
    ),
    "channels as a list": fault(
        lambda d: change_json(d, channel_names=["T1", "T2"]), "'channel_names'", "a list", remedy='{"0": "NAME"'
    ),
    "channel without a name": fault(
        lambda d: change_json(d, channel_names={"0": "T1", "1": None}), "'1': null", remedy='{"0": "NAME"'
    ),
    "fewer channel names than files": fault(
        lambda d: change_json(d, channel_names={"0": "T1"}), "case_0", "found 2", remedy="correct channel_names"
    ),
    "numTraining as text": fault(
        lambda d: change_json(d, numTraining="3"), "'numTraining'", "a text", remedy="without quotes"
    ),
    "numTraining that does not fit": fault(
        lambda d: change_json(d, numTraining=4), "3 cases", "expected 4 cases", remedy="correct numTraining"
    ),
    "file_ending of no file": fault(
        lambda d: change_json(d, file_ending=".nrrd"),
        "imagesTr",
        "6 files ending in .nii.gz",
        remedy="correct file_ending",
    ),
    "file_ending without dot": fault(
        lambda d: change_json(d, file_ending="nii.gz"), "'file_ending'", '"nii.gz"', remedy="with the dot"
    ),
    "file_ending as a number": fault(lambda d: change_json(d, file_ending=1), "'file_ending'", remedy="with the dot"),
    "files renamed to an unknown ending": fault(
        lambda d: (rename_all(d, ".scan"), change_json(d, file_ending=".scan")),
        "case_0_0000.scan",
        "no reader can read",
        remedy="convert the images",
    ),
    "unknown reader": fault(
        lambda d: change_json(d, overwrite_image_reader_writer="NiftiIO"),
        "'overwrite_image_reader_writer'",
        '"NiftiIO"',
        "NibabelIO",
        remedy="correct the name",
    ),
    "dataset as a list": fault(
        lambda d: change_json(d, dataset=[]), "'dataset' of dataset.json", "a list", remedy='{"CASE"'
    ),
    "dataset entry without label": fault(
        lambda d: change_json(d, dataset={"a": {"images": ["b"]}}), "'a'", remedy='"label": "FILE"'
    ),
    "listed image missing": fault(
        lambda d: list_files(d, images=["imagesTr/gone_0000.nii.gz"]),
        "case_1",
        "imagesTr/gone_0000.nii.gz",
        "no image",
        remedy="add the file",
    ),
    "listed label missing": fault(
        lambda d: list_files(d, label="$NOWHERE/gone.nii.gz"),
        "case_1",
        "gone.nii.gz",
        "no label",
        remedy="add the file",
    ),
    "listed channels out of order": fault(
        swap_channels_in_list,
        "case_1",
        "case_1_0001.nii.gz, case_1_0000.nii.gz",
        remedy="in the order of channel_names",
    ),
    "listed file of another ending": fault(
        lambda d: list_files(d, label="labelsTr/case_1.nrrd"), "case_1", "case_1.nrrd", remedy="one ending"
    ),
    "no image listed": fault(lambda d: list_files(d, images=[]), "case_1", "images: []", remedy="one image per"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES | VOXELS | JSON)
def test_fault_is_refused(name, dataset, refuse):
    spoiled = (FILES | VOXELS | JSON)[name]
    spoiled.spoil(dataset)
    outcome = refuse()
    for part in (*spoiled.names, spoiled.remedy):
        assert part in outcome.message, outcome.message


@pytest.mark.slow
def test_sound_dataset_is_not_refused(dataset, roots, monkeypatch):
    """The datasets above are refused for their one fault, not for another."""
    monkeypatch.setattr(
        sys, "argv", ["nnUNetv2_extract_fingerprint", "-d", "2", "-np", "1", "--no_pbar", "--verify_dataset_integrity"]
    )
    entrypoints.extract_fingerprint_entry()
    assert (roots["nnUNet_preprocessed"] / dataset.name / "dataset_fingerprint.json").is_file()


# -------------------------------------------------------------------------------------------------- other formats


def make_2d(roots, **changes: object) -> Path:
    """Two RGB photographs with labels in one channel."""
    folder = roots["nnUNet_raw"] / "Dataset002_Photos"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in ("a", "b"):
        io.imsave(folder / "imagesTr" / f"{case}_0000.png", rng.integers(0, 255, (12, 14, 3), dtype=np.uint8))
        io.imsave(folder / "labelsTr" / f"{case}.png", np.eye(12, 14, dtype=np.uint8), check_contrast=False)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "vessel": 1},
        "numTraining": 2,
        "file_ending": ".png",
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def make_stack(roots) -> Path:
    """Two 3D tif stacks with spacing."""
    folder = roots["nnUNet_raw"] / "Dataset002_Stacks"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in ("a", "b"):
        for file, values in (
            (f"imagesTr/{case}_0000.tif", rng.integers(0, 99, SHAPE)),
            (f"labelsTr/{case}.tif", rng.integers(0, 2, SHAPE)),
        ):
            tifffile.imwrite(folder / file, values.astype(np.uint8), photometric="minisblack")
        for name in ("imagesTr", "labelsTr"):
            (folder / name / f"{case}.json").write_text('{"spacing": [3, 1.5, 1]}')
    content = {
        "channel_names": {"0": "EM"},
        "labels": {"background": 0, "cell": 1},
        "numTraining": 2,
        "file_ending": ".tif",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


PNG = {
    "colours named as one channel": fault(
        lambda d: change_json(d, channel_names={"0": "photo"}),
        "a_0000.png",
        "found 3",
        remedy="name one channel per colour",
    ),
    "one image with alpha": fault(
        lambda d: io.imsave(d / "imagesTr" / "b_0000.png", np.full((12, 14, 4), 9, np.uint8), check_contrast=False),
        "b_0000.png",
        "found 4",
        remedy="convert the image",
    ),
    "label in colours": fault(
        lambda d: io.imsave(d / "labelsTr" / "b.png", np.ones((12, 14, 3), np.uint8), check_contrast=False),
        "labelsTr/b.png",
        "3 channels",
        remedy="convert",
    ),
    "label shown in white": fault(
        lambda d: io.imsave(d / "labelsTr" / "b.png", np.eye(12, 14, dtype=np.uint8) * 255, check_contrast=False),
        "labelsTr/b.png",
        "found 255",
        remedy="correct the label file",
    ),
    "truncated png": fault(
        lambda d: damage(d / "imagesTr" / "b_0000.png", lambda content: content[:200]),
        "imagesTr/b_0000.png",
        "cannot be read",
        remedy="replace it if it is damaged",
    ),
    "label turned on its side": fault(
        lambda d: io.imsave(d / "labelsTr" / "b.png", np.eye(14, 12, dtype=np.uint8), check_contrast=False),
        "labelsTr/b.png",
        "1 x 14 x 12",
        "1 x 12 x 14",
        remedy="replace it",
    ),
}

TIF = {
    "tif without spacing": fault(
        lambda d: (d / "imagesTr" / "b.json").unlink(), "imagesTr/b_0000.tif", "b.json", remedy='write {"spacing"'
    ),
    "label tif without spacing": fault(
        lambda d: (d / "labelsTr" / "b.json").unlink(), "labelsTr/b.tif", "b.json", remedy='write {"spacing"'
    ),
    "spacing in broken JSON": fault(
        lambda d: (d / "imagesTr" / "b.json").write_text("{"),
        "imagesTr/b_0000.tif",
        "not valid JSON",
        remedy='{"spacing": [a, b, c]}',
    ),
    "spacing of two numbers": fault(
        lambda d: (d / "imagesTr" / "b.json").write_text('{"spacing": [1, 2]}'),
        "imagesTr/b_0000.tif",
        "three numbers",
        remedy='{"spacing": [a, b, c]}',
    ),
    "spacing of 0": fault(
        lambda d: (d / "imagesTr" / "b.json").write_text('{"spacing": [0, 1, 1]}'),
        "imagesTr/b_0000.tif",
        "0, 1, 1",
        remedy="size of a voxel",
    ),
    "spacing in another order": fault(
        lambda d: (d / "labelsTr" / "b.json").write_text('{"spacing": [1, 1.5, 3]}'),
        "labelsTr/b.tif",
        "1, 1.5, 3 mm",
        remedy="which spacing is right",
    ),
    "truncated tif": fault(
        lambda d: damage(d / "imagesTr" / "b_0000.tif", lambda content: content[:150]),
        "imagesTr/b_0000.tif",
        "cannot be read",
        remedy="replace it",
    ),
}


@pytest.mark.parametrize(("make", "name"), [*((make_2d, name) for name in PNG), *((make_stack, name) for name in TIF)])
def test_fault_in_other_formats_is_refused(make, name, roots, refuse):
    spoiled = (PNG | TIF)[name]
    spoiled.spoil(make(roots))
    outcome = refuse()
    for part in (*spoiled.names, spoiled.remedy):
        assert part in outcome.message, outcome.message


# -------------------------------------------------------------------------------------------------- real scans


def test_real_scans_without_their_partner(shared_data, roots, refuse):
    source = shared_data / "hippocampus"
    folder = roots["nnUNet_raw"] / "Dataset002_Hippocampus"
    (folder / "imagesTr").mkdir(parents=True)
    shutil.copytree(source / "bad", folder / "labelsTr", ignore=lambda _, names: [n for n in names if "image_w" in n])
    for file in (folder / "labelsTr").iterdir():
        file.rename(file.with_name(file.name.replace("_label_without_image", "")))
    for name in ("001", "003"):
        shutil.copy(
            source / "images" / f"hippocampus_{name}.nii.gz", folder / "imagesTr" / f"hippocampus_{name}_0000.nii.gz"
        )
        shutil.copy(source / "labels" / f"hippocampus_{name}.nii.gz", folder / "labelsTr")
    shutil.copy(
        source / "bad" / "hippocampus_118_image_without_label.nii.gz",
        folder / "imagesTr" / "hippocampus_118_0000.nii.gz",
    )
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    outcome = refuse()
    assert "3 errors in 3 of 3 cases" in outcome.message
    for file in (
        "labelsTr/hippocampus_010.nii.gz  no image",
        "labelsTr/hippocampus_281.nii.gz  no image",
        "labelsTr/hippocampus_118.nii.gz  no label",
    ):
        assert file in outcome.table


def test_real_series_is_no_volume(shared_data, dataset, refuse):
    change_json(dataset, channel_names={"0": "MR"})
    for i in range(3):
        image_of(dataset, i, 1).unlink()
    shutil.copy(shared_data / "odd" / "sct_dmri.nii.gz", image_of(dataset))
    outcome = refuse()
    assert "case_1, imagesTr/case_1_0000.nii.gz: an image is a series (4D)" in outcome.message


# -------------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed"])
@pytest.mark.parametrize("named", ["2", "Dataset002_Scans"])
def test_unset_variable_is_refused(name, named, check, dataset, refuse, monkeypatch):
    monkeypatch.delenv(name)
    outcome = refuse(dataset=named, check=check)
    assert f"{name} is not set" in outcome.message and "getting-started.md" in outcome.message


def test_prediction_needs_the_variable_of_results(dataset, roots, monkeypatch, capsys):
    from nnunetv2.inference import predict_from_raw_data

    monkeypatch.delenv("nnUNet_results")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "nnUNetv2_predict",
            "-i",
            str(dataset / "imagesTr"),
            "-o",
            str(roots["nnUNet_results"] / "out"),
            "-d",
            "2",
            "-c",
            "2d",
            "-device",
            "cpu",
        ],
    )
    before = snapshot(roots)
    with pytest.raises(SystemExit):
        predict_from_raw_data.predict_entry_point()
    message = capsys.readouterr().err
    assert "nnUNet_results is not set" in message and "getting-started.md" in message
    assert snapshot(roots) == before


@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed"])
@pytest.mark.parametrize("named", ["2", "Dataset002_Scans"])
def test_variable_naming_a_missing_folder_is_refused(name, named, dataset, refuse, monkeypatch, tmp_path):
    monkeypatch.setenv(name, str(tmp_path / "not mounted" / "data"))
    outcome = refuse(dataset=named)
    assert f"{name}" in outcome.message and "not mounted" in outcome.message


def test_missing_dataset_is_refused(dataset, refuse):
    for missing in ("3", "Dataset003_Nowhere"):
        message = refuse(dataset=missing, check=False).message
        assert "3" in message and "nnUNet_raw" in message


@pytest.mark.parametrize("number", [100, 1000, 4321])
def test_two_datasets_of_one_number_are_refused(number, make_scans, make_case, refuse):
    folder = make_scans({"a": make_case(0)}, number=number)
    shutil.copytree(folder, folder.with_name(f"Dataset{number}_Other"))
    message = refuse(dataset=str(number)).message
    assert f"several datasets have the id {number}: Dataset{number}_Other, Dataset{number}_Scans" in message
    assert "Rename or remove" in message


def test_number_100_is_not_1000(make_scans, make_case, refuse):
    make_scans({"a": make_case(0)}, number=1000)
    assert "no dataset with id 100 found" in refuse(dataset="100").message


def test_a_file_in_place_of_the_output_folder_is_refused(dataset, roots, refuse):
    (roots["nnUNet_preprocessed"] / dataset.name).write_text("not a folder")
    message = refuse(check=False).message
    assert str(roots["nnUNet_preprocessed"] / dataset.name) in message


@pytest.fixture
def as_ordinary_user(tmp_path) -> Iterator[None]:
    """Let file permissions count for root, too: give up the privilege to pass over them for a while."""
    probe = tmp_path / "probe"
    probe.mkdir(mode=0o500)
    with privileges_dropped():
        with pytest.raises(PermissionError):
            (probe / "file").touch()
        yield


def test_read_only_folder_is_refused(dataset, roots, as_ordinary_user, refuse):
    roots["nnUNet_preprocessed"].chmod(0o500)
    try:
        message = refuse(check=False).message
    finally:
        roots["nnUNet_preprocessed"].chmod(0o700)
    assert str(roots["nnUNet_preprocessed"]) in message and "permission" in message.lower()


@pytest.mark.parametrize("file", [image_of, label_of])
def test_unreadable_file_is_refused(file, dataset, as_ordinary_user, refuse):
    file(dataset).chmod(0)
    message = refuse().message
    assert file(dataset).name in message and "may not be read" in message and "chmod u+r" in message


# -------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of 300 KB, mounted where that is allowed."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
        if shutil.which("mount")
        else None
    )
    if mount is None or mount.returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_refused_at_the_start(dataset, full_disk, refuse, monkeypatch):
    (full_disk / "ballast").write_bytes(bytes(290_000))
    monkeypatch.setenv("nnUNet_preprocessed", str(full_disk))
    message = refuse(check=False).message
    assert str(full_disk) in message and "No space left" in message and "free some space" in message


def run_as_process(limit: int | None, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command in a process that may not write files above a size, the stand-in for a quota."""
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else "") + (
        "import sys; sys.argv[0] = 'nnUNetv2_plan_and_preprocess'\n"
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry\n"
        "if __name__ == '__main__': plan_and_preprocess_entry()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")


@needs_limits
def test_quota_is_noticed_at_the_start(dataset, roots):
    before = snapshot(roots)
    done = run_as_process(10_000, "-d", "2", "-npfp", "1", "-np", "1", "--no_pbar")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "nnUNet_preprocessed cannot be written to (File too large)" in line and "free some space" in line
    assert snapshot(roots) == before


@pytest.mark.slow
@needs_limits
def test_disk_that_fills_up_leaves_no_half_written_case(make_scans, make_case, roots):
    make_scans({f"case_{i}": make_case(i, shape=(10, 60, 64)) for i in range(2)})
    done = run_as_process(70_000, "-d", "2", "-npfp", "1", "-np", "1", "--no_pbar", "-c", "3d_fullres")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("nnUNetv2_plan_and_preprocess: error:") and "case_0" in message, done.stderr
    assert not [file for file in roots["nnUNet_preprocessed"].rglob("*") if "case_" in file.name]


@pytest.mark.slow
def test_refusal_is_the_same_as_a_process(dataset):
    image_of(dataset).unlink()
    done = run_as_process(None, "-d", "2", "-npfp", "1", "--verify_dataset_integrity", "--no_pbar")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error:" in line] == done.stderr.splitlines()[-1:]
    assert "imagesTr/case_1_0000.nii.gz" in done.stderr.splitlines()[-1]
    assert "1. A channel is missing" in done.stdout


# -------------------------------------------------------------------------------------------------- without the check

UNCHECKED = {
    "broken JSON": fault(
        lambda d: (d / "dataset.json").write_text("{"), "dataset.json is not valid JSON", remedy="correct the file"
    ),
    "no dataset.json": fault(
        lambda d: (d / "dataset.json").unlink(), "has no dataset.json", remedy="dataset-format.md"
    ),
    **{
        f"no {key}": fault(
            lambda d, key=key: change_json(d, remove=key), "dataset.json", f"lacks {key}", remedy="add what is missing"
        )
        for key in ("labels", "channel_names", "file_ending")
    },
    "channel missing": fault(
        lambda d: image_of(d, channel=1).unlink(), "case_1", "1 channel", remedy="dataset.json names 2"
    ),
    "label missing": fault(lambda d: label_of(d).unlink(), "case_1", remedy="does not exist"),
    "truncated image": fault(
        lambda d: damage(image_of(d), lambda content: content[:200]), "case_1", "damaged", remedy="copy the file again"
    ),
    "label of another shape": fault(
        lambda d: write_nifti(np.ones((7, 8, 10), np.uint8), label_of(d), SPACING),
        "case_1",
        "(7, 8, 10)",
        remedy="must be equal",
    ),
    "no foreground": fault(make_labels_empty, "case_0, case_1, case_2", remedy="a label above 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCHECKED)
def test_fault_is_refused_without_the_check_too(name, dataset, roots, refuse):
    UNCHECKED[name].spoil(dataset)
    message = refuse(check=False).message
    for part in (*UNCHECKED[name].names, UNCHECKED[name].remedy):
        assert part in message, message


# -------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.slow
def test_listed_files_may_lie_anywhere(dataset, roots, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(dataset / "imagesTr", elsewhere)
    shutil.rmtree(dataset / "imagesTr")
    monkeypatch.setenv("SCANS", str(elsewhere))
    change_json(
        dataset,
        numTraining=2,
        dataset={
            "one": {
                "images": ["$SCANS/case_0_0000.nii.gz", "${SCANS}/case_2_0000.nii.gz"],
                "label": "labelsTr/case_0.nii.gz",
            },
            "two": {
                "images": [str(elsewhere / "case_1_0001.nii.gz"), "../../elsewhere/case_1_0000.nii.gz"][::-1],
                "label": str(dataset / "labelsTr" / "case_1.nii.gz"),
            },
        },
    )
    monkeypatch.setattr(
        sys, "argv", ["nnUNetv2_extract_fingerprint", "-d", "2", "-np", "1", "--no_pbar", "--verify_dataset_integrity"]
    )
    entrypoints.extract_fingerprint_entry()
    assert (roots["nnUNet_preprocessed"] / dataset.name / "dataset_fingerprint.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, [1, 2]),
        ({"background": 0, "organ": 1, "ignore": 2}, None),
        ({"background": 0, "organ": [1], "tumour": 2}, None),
        ({"background": 0, "all": [1], "part": 1, "ignore": 2}, None),
    ],
)
def test_kinds_of_labels(labels, order, dataset, roots, monkeypatch):
    change_json(dataset, labels=labels, **({"regions_class_order": order} if order else {}))
    monkeypatch.setattr(
        sys, "argv", ["nnUNetv2_extract_fingerprint", "-d", "2", "-np", "1", "--no_pbar", "--verify_dataset_integrity"]
    )
    entrypoints.extract_fingerprint_entry()


@pytest.mark.slow
def test_preprocessed_folder_is_created(dataset, roots, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "new"))
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_extract_fingerprint", "-d", "2", "-np", "1", "--no_pbar"])
    entrypoints.extract_fingerprint_entry()
    assert (tmp_path / "new" / dataset.name / "dataset_fingerprint.json").is_file()


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "SimpleITKIO", "SimpleITKIOWithReorient"])
def test_named_readers_check_alike(reader, dataset, refuse):
    change_json(dataset, overwrite_image_reader_writer=reader)
    write_values(image_of(dataset), a=np.nan)
    change_header(label_of(dataset, 2), Origin=(5.0, 0.0, 0.0))
    outcome = refuse()
    assert "2 errors in 2 of 3 cases" in outcome.message and "1 voxels" in outcome.message
    assert "off by up to 5 mm" in outcome.table
