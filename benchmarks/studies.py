"""Compare ways to train on real scans: breast ultrasound, hippocampus, retina, spinal cord.

    python -m benchmarks.studies breastus --folder WORK [--data FOLDER] [--seeds 3] [--arms ...] [--c] [--anew]

Lays out raw datasets from the project's shared data (not part of the project, licences in its README) and runs
`nnUNetv2_fed_compare` with a study's lengths and small networks, as two CPU cores demand. The results in RESULTS.md are
those of these commands. Trainings whose scores lie in `study_results/` are not run again, unless with --anew: so seeds
add up over days, and everybody can compute the tables from the scores of every case.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.federated.commands.simulate import LocalSite, find_command

KNOWN = Path(__file__).with_name("study_results")
"""A file TASK.json is the result.json of a comparison, without line breaks."""
ARMS = ("alone", "pooled", "pooled-all", "ffe", "ffe-uniform", "asym", "asym-resolution")


@dataclass(frozen=True)
class Scan:
    """One case of the shared data."""

    site: str
    name: str
    image: Path
    label: Path
    is_test: bool


@dataclass(frozen=True, kw_only=True)
class Task:
    """A study: its scans, and how long which networks are trained."""

    first_id: int
    sites: tuple[str, ...]
    external: tuple[str, ...] = ()
    channel: str
    labels: Mapping[str, int | list[int]]
    file_ending: str
    scans: Callable[[Path], Iterator[Scan]]
    configuration: str
    epochs: int
    iterations: int
    network: Mapping[str, Any]
    """Part of the patch of plans: fields of the configuration."""
    arms: tuple[str, ...] = ARMS
    copies_images: bool = False
    """Write images anew in the format that nnU-Net reads, instead of linking them."""
    regions_class_order: tuple[int, ...] = ()
    """Given where labels are regions."""


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def breast_ultrasound(data: Path) -> Iterator[Scan]:
    """Yield 311 images of four hospitals of very unequal size."""
    for row in _rows(data / "breastus" / "cases.csv"):
        folder, name = data / "breastus" / row["site"], f"{row['case']}.png"
        yield Scan(row["site"], row["case"], folder / "images" / name, folder / "labels" / name, row["split"] == "test")


def hippocampus(data: Path) -> Iterator[Scan]:
    """Yield 260 MR crops in five groups of intensities."""
    for row in _rows(data / "hippocampus" / "sites.csv"):
        image, label = (data / "hippocampus" / kind / f"{row['case']}.nii.gz" for kind in ("images", "labels"))
        yield Scan(row["site"], row["case"], image, label, row["split"] == "test")


def retina(data: Path) -> Iterator[Scan]:
    """Yield 73 fundus photographs of two institutions."""
    for row in _rows(data / "retina" / "splits.csv"):
        folder = data / "retina" / row["site"]
        image = next(path for path in sorted((folder / "images").iterdir()) if path.stem == row["case"])
        label = next(path for path in sorted((folder / "labels").iterdir()) if path.stem == row["case"])
        yield Scan(row["site"], row["case"], image, label, row["split"] == "test")


def spinal_cord(data: Path, left_out: Sequence[str] = ()) -> Iterator[Scan]:
    """Yield 8 volumes of six hospitals; the second scan of a hospital with two, and those left out, are for testing."""
    rows = _rows(data / "spinalcord" / "cases.csv")
    count = {row["site"]: sum(other["site"] == row["site"] for other in rows) for row in rows}
    seen: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row["case"]):
        site, name = row["site"], f"{row['case']}.nii.gz"
        seen[site] = seen.get(site, 0) + 1
        is_test = site in left_out or (count[site] > 1 and seen[site] == count[site])
        folder = data / "spinalcord" / site
        yield Scan(site, row["case"], folder / "images" / name, folder / "labels" / name, is_test)


SMALL_2D: Mapping[str, Any] = {
    "batch_size": 4,
    "patch_size": [128, 128],
    "architecture": {"arch_kwargs": {"features_per_stage": [8, 16, 32, 64, 64, 64, 64, 64]}},
}

WHOLE_IMAGES_2D: Mapping[str, Any] = {**SMALL_2D, "spacing": [2.0, 2.0]}
"""At half the resolution a patch holds a whole image of 256 x 256 pixels."""

COARSE_IMAGES_2D: Mapping[str, Any] = {**SMALL_2D, "patch_size": [64, 64], "spacing": [4.0, 4.0]}
"""The same at a quarter of the resolution: a third of the time, for the many arms that differ in one switch."""

_STAGES = 6
VESSELS_2D: Mapping[str, Any] = {
    **SMALL_2D,
    "batch_size": 2,
    "spacing": [2.0, 2.0],
    "architecture": {
        "arch_kwargs": {
            "n_stages": _STAGES,
            "features_per_stage": [8, 16, 32, 64, 64, 64],
            "kernel_sizes": [[3, 3]] * _STAGES,
            "strides": [[1, 1]] + [[2, 2]] * (_STAGES - 1),
            "n_conv_per_stage": [2] * _STAGES,
            "n_conv_per_stage_decoder": [2] * (_STAGES - 1),
        }
    },
}
"""At half resolution, vessels are two to four pixels wide. Networks planned for these images have 8 and 9 stages."""

CORD_2D: Mapping[str, Any] = {**SMALL_2D, "batch_size": 2, "patch_size": [64, 64], "spacing": [0.75, 0.75]}
"""48 mm around the cord, which is 12 mm wide."""

CORD_SITES = ("ucl", "nwu", "chum", "juntendo", "milan", "ceitec")


def _cord_task(*left_out: str) -> Task:
    """Return the study of the spinal cord without two of the four hospitals that have one scan, which test its models.

    White and gray matter are one region: trainings of these lengths find gray matter or not, by chance.
    """
    return Task(
        first_id=540,
        sites=tuple(site for site in CORD_SITES if site not in left_out),
        external=left_out,
        channel="MRI",
        labels={"background": 0, "cord": [1, 2]},
        regions_class_order=(1,),
        file_ending=".nii.gz",
        scans=lambda data: spinal_cord(data, left_out),
        configuration="2d",
        epochs=40,
        iterations=10,
        network=CORD_2D,
    )


BREAST_ULTRASOUND = Task(
    first_id=501,
    sites=("cairo", "rio", "warsaw", "busuc"),
    channel="ultrasound",
    labels={"background": 0, "lesion": 1},
    file_ending=".png",
    scans=breast_ultrasound,
    configuration="2d",
    epochs=40,
    iterations=25,
    network=WHOLE_IMAGES_2D,
)

TASKS: Mapping[str, Task] = {
    "breastus": BREAST_ULTRASOUND,
    "breastus-coarse": replace(BREAST_ULTRASOUND, iterations=20, network=COARSE_IMAGES_2D, arms=("alone", "ffe")),
    "hippocampus": Task(
        first_id=511,
        sites=("A", "B", "C", "D", "E"),
        channel="MRI",
        labels={"background": 0, "anterior": 1, "posterior": 2},
        file_ending=".nii.gz",
        scans=hippocampus,
        configuration="3d_fullres",
        epochs=40,
        iterations=50,
        network={
            "batch_size": 2,
            "patch_size": [24, 32, 24],
            "architecture": {"arch_kwargs": {"features_per_stage": [8, 16, 32, 64, 64, 64, 64]}},
        },
    ),
    "retina": Task(
        first_id=521,
        sites=("chasedb1", "hrf"),
        channel="fundus",
        labels={"background": 0, "vessel": 1},
        file_ending=".png",
        scans=retina,
        configuration="2d",
        epochs=40,
        iterations=12,
        network=VESSELS_2D,
        copies_images=True,
    ),
    "spinalcord-1": _cord_task("ucl", "nwu"),
    "spinalcord-2": _cord_task("chum", "juntendo"),
}


def dataset_name(task: Task, site: str) -> str:
    """Return the name of a site's dataset."""
    return f"Dataset{task.first_id + [*task.sites, *task.external].index(site)}_{site.capitalize()}"


def local_sites(task: Task, credentials: Path, environment: Mapping[str, str]) -> list[LocalSite]:
    """Return the sites of a task, as the commands of a simulation run them."""
    return [
        LocalSite(
            name=site,
            dataset=dataset_name(task, site),
            credential=credentials / f"{site}.json",
            environment=dict(environment),
        )
        for site in task.sites
    ]


def write_datasets(task: Task, data: Path, raw: Path) -> None:
    """Write one raw dataset per site; test cases go to imagesTs and labelsTs."""
    scans = list(task.scans(data))
    for site in (*task.sites, *task.external):
        folder = raw / dataset_name(task, site)
        chosen = [scan for scan in scans if scan.site == site]
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / name).mkdir(parents=True)
        channels = _channels(chosen[0].image) if task.copies_images else 1
        for scan in chosen:
            kind = "Ts" if scan.is_test else "Tr"
            image = folder / f"images{kind}" / f"{scan.name}_0000{task.file_ending}"
            label = folder / f"labels{kind}" / f"{scan.name}{task.file_ending}"
            if task.copies_images:
                _write_png(scan.image, image)
                _write_png(scan.label, label, is_label=True)
            else:
                image.symlink_to(scan.image)
                label.symlink_to(scan.label)
        description = {
            "channel_names": {str(number): task.channel for number in range(channels)},
            "labels": dict(task.labels),
            "file_ending": task.file_ending,
            "numTraining": sum(not scan.is_test for scan in chosen),
        }
        if task.regions_class_order:
            description["regions_class_order"] = list(task.regions_class_order)
        (folder / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")


def _channels(image: Path) -> int:
    from skimage.io import imread

    array = imread(image)
    return array.shape[2] if array.ndim == 3 else 1


def _write_png(source: Path, target: Path, *, is_label: bool = False) -> None:
    from skimage.io import imread, imsave

    array = imread(source)
    imsave(target, (array > 0).astype("uint8") if is_label else array, check_contrast=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    default = Path(os.environ.get("FEDNNUNET_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; the report lies in FOLDER/study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--arms_file", type=Path)
    parser.add_argument("--c", dest="go_on", action="store_true")
    parser.add_argument("--anew", action="store_true", help="train what study_results/ knows, too")
    arguments = parser.parse_args(argv)
    task, folder = TASKS[arguments.task], arguments.folder.resolve()
    raw, patch = folder / "nnUNet_raw", folder / "plans_patch.json"
    if not raw.exists():
        write_datasets(task, arguments.data.resolve(), raw)
        content = {"configurations": {task.configuration: dict(task.network)}}
        patch.write_text(json.dumps(content, indent=1), encoding="utf-8")
    known = KNOWN / f"{arguments.task}.json"
    external = [dataset_name(task, site) for site in task.external]
    command = [
        *(find_command("nnUNetv2_fed_compare"), "-d", *(dataset_name(task, site) for site in task.sites)),
        *(["--external", *external] if external else []),
        *("-c", task.configuration, "--arms", *(arguments.arms or task.arms), "--seeds", str(arguments.seeds)),
        *("--epochs", str(task.epochs), "--iterations", str(task.iterations), "--val_iterations", "2"),
        *("--plans_patch", str(patch), "--folder", str(folder / "study"), "-device", "cpu"),
        *(["--arms_file", str(arguments.arms_file)] if arguments.arms_file else []),
        *(["--known", str(known)] if known.exists() and not arguments.anew else []),
        *(["--c"] if arguments.go_on else []),
    ]
    return subprocess.run(command, env={**os.environ, "nnUNet_raw": str(raw)}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
