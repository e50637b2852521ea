"""Compare prediction with ONNX files with prediction on torch in float32: label maps, and the time of all cores.

    python -m benchmarks.onnx_prediction --data FOLDER_OF_REAL_SCANS [--only hippocampus spinalcord retina tiles]
        [--epochs 4 --iterations 25] [--threads 2]

Hippocampus (3D), spinal cord (3D, six hospitals) and retina (2D, colours): a small network is planned, trained for
some iterations, exported, and predicts cases that it has not seen, once per way, from files to files; imports count.
`tiles` is the network alone, in the size of nnU-Net's defaults, untrained.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from tiny_models import TinyModel, write_model  # noqa: E402

from benchmarks.process_tree import measure  # noqa: E402

TRAINER, FOLD = "nnUNetTrainerShort", "all"
TRAIN, TEST = 12, 4
MOST_FEATURES, STEM_FEATURES = 64, 8
PARTS = ("hippocampus", "spinalcord", "retina", "tiles")
SHORT_TRAINER = '''
import os
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["BENCHMARK_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["BENCHMARK_ITERATIONS"])
        self.num_val_iterations_per_epoch = 1

    def perform_actual_validation(self, save_probabilities=False):
        """Do nothing: cases are predicted afterwards, and fold all has no others."""
'''
TILES = {"2d": ((3, 256, 256), 7), "3d": ((1, 64, 96, 96), 5)}
"""Channels and patch, and stages."""


@dataclass(frozen=True)
class Task:
    """A dataset that is made from the folder of real scans."""

    number: int
    configuration: str
    patch_size: Sequence[int]
    labels: Mapping[str, int]
    channels: Sequence[str]
    ending: str
    list_cases: Callable[[Path], list[tuple[str, Path, Path]]]
    """Folder -> (name, image, label map) of each case."""


def list_hippocampus(data: Path) -> list[tuple[str, Path, Path]]:
    folder = data / "hippocampus"
    return [(path.name[:-7], path, folder / "labels" / path.name) for path in sorted((folder / "images").iterdir())]


def list_spinal_cord(data: Path) -> list[tuple[str, Path, Path]]:
    """Return cases of all hospitals in turn."""
    sites = [sorted(folder.glob("images/*.nii.gz")) for folder in sorted((data / "spinalcord").iterdir())]
    paths = [path for turn in zip_longest(*filter(None, sites)) for path in turn if path is not None]
    return [(path.name[:-7], path, path.parents[1] / "labels" / path.name) for path in paths]


def list_retina(data: Path) -> list[tuple[str, Path, Path]]:
    with (data / "retina" / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "hrf"]
    folder = data / "retina" / "hrf"
    return [
        (row["case"], *(next((folder / kind).glob(f"{row['case']}.*")) for kind in ("images", "labels")))
        for row in rows
    ]


TASKS = {
    "hippocampus": Task(
        501, "3d_fullres", (40, 56, 40), {"background": 0, "anterior": 1, "posterior": 2}, ("MRI",), ".nii.gz",
        list_hippocampus,
    ),
    "spinalcord": Task(
        502, "3d_fullres", (12, 128, 128), {"background": 0, "white": 1, "gray": 2}, ("MRI",), ".nii.gz",
        list_spinal_cord,
    ),
    "retina": Task(
        503, "2d", (256, 256), {"background": 0, "vessel": 1}, ("red", "green", "blue"), ".png", list_retina
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- trainings
def write_raw_dataset(folder: Path, task: Task, data: Path) -> None:
    """Write training and test cases; photographs become png files."""
    cases = task.list_cases(data)
    step = max(1, len(cases) // (TRAIN + TEST))
    chosen = cases[::step][: TRAIN + TEST]
    num_train = min(TRAIN, len(chosen) - len(chosen) // 4)
    for number, (name, image, label) in enumerate(chosen):
        kind = "Tr" if number < num_train else "Ts"
        for suffix in ("images", "labels"):
            (folder / f"{suffix}{kind}").mkdir(parents=True, exist_ok=True)
        copy(image, folder / f"images{kind}" / f"{name}_0000{task.ending}")
        copy(label, folder / f"labels{kind}" / f"{name}{task.ending}")
    description = {
        "channel_names": {str(i): name for i, name in enumerate(task.channels)},
        "labels": task.labels,
        "file_ending": task.ending,
        "numTraining": num_train,
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    if target.suffix != ".png":
        target.symlink_to(source.resolve())
        return
    import imageio.v3

    image = imageio.v3.imread(source)
    is_label = "labels" in target.parent.name
    imageio.v3.imwrite(target, (image > 0).astype(np.uint8) if is_label else image)


def shrink_plans(path: Path, task: Task) -> None:
    """Give the network a size that two cores train."""
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"][task.configuration]
    configuration.update(batch_size=2, patch_size=list(task.patch_size))
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(STEM_FEATURES * 2**i, MOST_FEATURES) for i in range(network["n_stages"])]
    path.write_text(json.dumps(plans), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ report
def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(part: str, arguments: argparse.Namespace, folder: Path) -> None:
    """Train, predict in both ways, and print a row of the table."""
    task = TASKS[part]
    roots = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    dataset = f"Dataset{task.number}_{part}"
    write_raw_dataset(folder / "nnUNet_raw" / dataset, task, arguments.data)
    for root in roots.values():
        Path(root).mkdir(exist_ok=True)
    (folder / "trainers").mkdir()
    (folder / "trainers" / "short.py").write_text(SHORT_TRAINER, encoding="utf-8")
    environment = {
        **roots,
        "nnUNet_extTrainer": str(folder / "trainers"),
        "BENCHMARK_EPOCHS": str(arguments.epochs),
        "BENCHMARK_ITERATIONS": str(arguments.iterations),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": str(arguments.threads),
    }

    def run(program: str, *options: object, **variables: str) -> float:
        """Run a command and return the time of all cores."""
        words = [str(Path(sys.executable).parent / program)] if program != "python" else [sys.executable]
        before = cpu_seconds_of_children()
        measure([*words, *map(str, options)], {**environment, **variables})
        return cpu_seconds_of_children() - before

    named = ("-d", task.number, "-c", task.configuration)
    run("nnUNetv2_extract_fingerprint", "-d", task.number, "-np", 1)
    run("nnUNetv2_plan_experiment", "-d", task.number)
    shrink_plans(folder / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json", task)
    run("nnUNetv2_preprocess", *named, "-np", 1)
    run("nnUNetv2_train", task.number, task.configuration, FOLD, "-tr", TRAINER, "-device", "cpu")
    run("nnUNetv2_export_onnx", *named, "-tr", TRAINER, "-f", FOLD, "-o", folder / "onnx")
    images = folder / "nnUNet_raw" / dataset / "imagesTs"
    on_torch = run(
        "nnUNetv2_predict", *named, "-tr", TRAINER, "-f", FOLD, "-i", images, "-o", folder / "torch", "-device", "cpu",
        "--disable_progress_bar", nnUNet_cpu_autocast="0",
    )  # fmt: skip
    with_onnx = run(
        "python", "-m", "nnunetv2.inference.onnx", "-m", folder / "onnx", "-i", images, "-o", folder / "predicted"
    )
    share, foreground = agreement(folder / "torch", folder / "predicted", task.ending)
    print(
        f"| {part}, {task.configuration} | {len(list(images.iterdir()))} | {100 * share:.4f} % "
        f"| {100 * foreground:.1f} % | {on_torch:.1f} s | {with_onnx:.1f} s | {with_onnx / on_torch:.2f} |",
        flush=True,
    )


def agreement(folder: Path, other: Path, ending: str) -> tuple[float, float]:
    """Return the share of voxels with the same label, and the share of foreground."""
    import SimpleITK as sitk

    def read(path: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))

    maps = [(read(path), read(other / path.name)) for path in folder.glob(f"*{ending}")]
    total = sum(one.size for one, _ in maps)
    return (
        sum(np.count_nonzero(one == two) for one, two in maps) / total,
        sum(np.count_nonzero(one) for one, _ in maps) / total,
    )


# ------------------------------------------------------------------------------------------------------------- tiles
class DefaultSize(TinyModel):
    """A model with as many convolutions as nnU-Net plans by default."""

    def architecture(self) -> dict[str, Any]:
        architecture = super().architecture()
        stages = len(self.features)
        architecture["arch_kwargs"] |= {
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
        }
        return architecture


def compare_tiles(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the time of all cores for a tile, and the largest difference of logits."""
    import torch

    from nnunetv2.inference.onnx.network import OnnxNetwork
    from nnunetv2.model_sharing.onnx_export import export_to_onnx
    from nnunetv2.models.model_folder import load_model_folder
    from nnunetv2.models.networks import speed_up_on_cpu_
    from nnunetv2.utilities.plug_in_kinds import TRAINER

    torch.set_num_threads(arguments.threads)
    os.environ["nnUNet_cpu_autocast"] = "0"
    for name, (shape, stages) in TILES.items():
        channels, *patch = shape
        most = 512 if len(patch) == 2 else 320
        model = DefaultSize(
            patch_size=patch,
            spacing=[1.0] * len(patch),
            channels=[str(i) for i in range(channels)],
            features=[min(32 * 2**i, most) for i in range(stages)],
            mirroring_axes=None,
        )
        write_model(folder / name, model)
        (file,) = export_to_onnx(folder / name, folder / f"{name}_onnx")
        loaded = load_model_folder(
            folder / name,
            0,
            "checkpoint_final.pth",
            find_trainer=lambda _: TRAINER.base_class(),
            fallback=TRAINER.base_class,
        )
        network = speed_up_on_cpu_(loaded.network.eval(), "cpu")
        exported = OnnxNetwork(file, num_threads=arguments.threads)
        tile = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        with torch.inference_mode():
            tensor = torch.from_numpy(tile)
            on_torch, expected = least_cpu_seconds(lambda: network(tensor).numpy())  # noqa: B023
        with_onnx, found = least_cpu_seconds(lambda: exported(tile))  # noqa: B023
        parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(
            f"| a tile {'x'.join(map(str, patch))} of a network of {parameters:.0f} M, {name} | | logits differ by "
            f"{np.abs(found - expected).max():.1e} | | {on_torch:.2f} s | {with_onnx:.2f} s "
            f"| {with_onnx / on_torch:.2f} |",
            flush=True,
        )


def least_cpu_seconds(function: Callable[[], np.ndarray], repeats: int = 5) -> tuple[float, np.ndarray]:
    """Return the least time of all cores that a function takes after a first call, and its result."""
    result, seconds = function(), []
    for _ in range(repeats):
        before = time.process_time()
        result = function()
        seconds.append(time.process_time() - before)
    return min(seconds), result


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data", help="folder of real scans")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these only")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=25, help="per epoch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    print(
        "| model | cases | voxels with the same label | foreground | torch, float32 | ONNX | ratio |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    for part in arguments.only:
        with TemporaryDirectory() as folder:
            (compare_tiles if part == "tiles" else partial(compare, part))(arguments, Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
