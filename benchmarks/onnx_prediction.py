"""Compare prediction with ONNX files with prediction on torch in float32: label maps, and the time of all cores.

    python -m benchmarks.onnx_prediction --data FOLDER_OF_REAL_SCANS [--folder WORK]
        [--only hippocampus regions spinalcord retina tiles] [--threads 2]

Hippocampus (3D; labels, and regions), spinal cord (3D, six hospitals) and retina (2D, colours): a small network is
planned, trained for some iterations, exported, and predicts cases that it has not seen, once per way, from files to
files; imports count. `tiles` is the network alone, in the size of nnU-Net's defaults, untrained.

Ends with 1 if label maps agree in less than 99.9 % of voxels or a label's Dice is below 0.99, if a network predicts
one label only, whose agreement says nothing, or if ONNX takes more than 1.2 times the processor time of torch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
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

FOLD = "all"
LEAST_AGREEMENT, LEAST_DICE, MOST_TIME = 0.999, 0.99, 1.2
TRAIN, TEST = 12, 4
MOST_FEATURES, STEM_FEATURES = 64, 8
ITERATIONS = 50
ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
Run = Callable[..., float]
"""(program, *options, **variables of the environment) -> seconds of all cores."""
PARTS = ("hippocampus", "regions", "spinalcord", "retina", "tiles")
TILES = {"2d": ((3, 256, 256), 7), "3d": ((1, 64, 96, 96), 5)}
"""Channels and patch, and stages."""


@dataclass(frozen=True)
class Task:
    """A dataset that is made from the folder of real scans."""

    number: int
    configuration: str
    patch_size: Sequence[int]
    batch_size: int
    epochs: int
    """Of 50 iterations."""
    class_weights: Sequence[str]
    """In the cross entropy: without them so short a training ends with a network that answers background."""
    labels: Mapping[str, int | Sequence[int]]
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


_MRI = {"channels": ("MRI",), "ending": ".nii.gz"}
TASKS = {
    "hippocampus": Task(
        number=501,
        configuration="3d_fullres",
        patch_size=(32, 40, 32),
        batch_size=2,
        epochs=6,
        class_weights=("anterior=5", "posterior=5"),
        labels={"background": 0, "anterior": 1, "posterior": 2},
        list_cases=list_hippocampus,
        **_MRI,
    ),
    "regions": Task(
        number=504,
        configuration="3d_fullres",
        patch_size=(32, 40, 32),
        batch_size=2,
        epochs=6,
        class_weights=("hippocampus=5", "posterior=5"),
        labels={"background": 0, "hippocampus": [1, 2], "posterior": [2]},
        list_cases=list_hippocampus,
        **_MRI,
    ),
    # A hundredth of these scans is cord: in smaller patches it has a larger share.
    "spinalcord": Task(
        number=502,
        configuration="3d_fullres",
        patch_size=(8, 64, 64),
        batch_size=4,
        epochs=34,
        class_weights=("white=2", "gray=10"),
        labels={"background": 0, "white": 1, "gray": 2},
        list_cases=list_spinal_cord,
        **_MRI,
    ),
    "retina": Task(
        number=503,
        configuration="2d",
        patch_size=(256, 256),
        batch_size=2,
        epochs=5,
        class_weights=("vessel=5",),
        labels={"background": 0, "vessel": 1},
        channels=("red", "green", "blue"),
        ending=".png",
        list_cases=list_retina,
    ),
}


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
    regions = [labels[0] for labels in task.labels.values() if not isinstance(labels, int)]
    if regions:
        description["regions_class_order"] = regions
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    if target.exists():  # from a run that was interrupted
        return
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
    configuration.update(batch_size=task.batch_size, patch_size=list(task.patch_size))
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(STEM_FEATURES * 2**i, MOST_FEATURES) for i in range(network["n_stages"])]
    path.write_text(json.dumps(plans), encoding="utf-8")


def train(part: str, arguments: argparse.Namespace, folder: Path, run: Run) -> None:
    """Plan, preprocess and train with the commands that people type."""
    task = TASKS[part]
    dataset = f"Dataset{task.number}_{part}"
    write_raw_dataset(folder / "nnUNet_raw" / dataset, task, arguments.data)
    for root in ROOTS:
        (folder / root).mkdir(exist_ok=True)
    run("nnUNetv2_extract_fingerprint", "-d", task.number, "-np", 1)
    run("nnUNetv2_plan_experiment", "-d", task.number)
    shrink_plans(folder / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json", task)
    run("nnUNetv2_preprocess", "-d", task.number, "-c", task.configuration, "-np", 1)
    run(
        *("nnUNetv2_train", task.number, task.configuration, FOLD, "-device", "cpu", "--seed", 1),
        *("--epochs", arguments.epochs or task.epochs, "--iterations", ITERATIONS, "--val_iterations", 2),
        *("--class_weights", *task.class_weights),
    )


# --------------------------------------------------------------------------------------------------------- agreement
@dataclass(frozen=True)
class Agreement:
    """The agreement of two ways to predict."""

    same: float
    """Share of voxels with the same label."""
    shares: Mapping[int, float]
    """Label -> share of the voxels that torch gives it."""
    least_dice: float
    """Of both predictions of a label, for the label where they differ most."""


def compare_maps(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Agreement:
    """Compare label maps of torch and ONNX."""
    maps = [(one.ravel(), two.ravel()) for one, two in pairs]
    first, second = (np.concatenate(several) for several in zip(*maps))
    labels = np.unique([*np.unique(first), *np.unique(second)])
    counts = {int(label): (np.count_nonzero(first == label), np.count_nonzero(second == label)) for label in labels}
    common = {label: np.count_nonzero((first == label) & (second == label)) for label in counts}
    return Agreement(
        same=np.count_nonzero(first == second) / first.size,
        shares={label: of_first / first.size for label, (of_first, _) in counts.items()},
        least_dice=min(2 * common[label] / sum(both) for label, both in counts.items()),
    )


def find_faults(agreement: Agreement, time_ratio: float) -> list[str]:
    """Return the faults, in words."""
    predicted = [label for label, share in agreement.shares.items() if share > 0]
    faults = []
    if len(predicted) < 2:
        faults.append(
            f"the network predicts label {predicted} only: its agreement says nothing. Train longer (--epochs)"
        )
    if agreement.same < LEAST_AGREEMENT:
        faults.append(f"{100 * agreement.same:.3f} % of voxels agree, wanted {100 * LEAST_AGREEMENT} %")
    if agreement.least_dice < LEAST_DICE:
        faults.append(f"a label agrees with a Dice of {agreement.least_dice:.3f}, wanted {LEAST_DICE}")
    if not time_ratio <= MOST_TIME:
        faults.append(f"ONNX takes {time_ratio:.2f} times the time of torch, wanted {MOST_TIME} at most")
    return faults


def read_maps(folder: Path, other: Path, ending: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the label maps of all cases in both folders."""
    import SimpleITK as sitk

    def read(path: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))

    return [(read(path), read(other / path.name)) for path in sorted(folder.glob(f"*{ending}"))]


def largest_difference(model: Path, exported: Path, image: Path) -> float:
    """Return the largest difference between the probabilities of both ways, for an image."""
    import torch

    from nnunetv2.inference.onnx import OnnxPredictor
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    os.environ["nnUNet_cpu_autocast"] = "0"
    on_torch = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    on_torch.initialize_from_trained_model_folder(str(model), FOLD)
    voxels, properties = on_torch.plans_manager.image_reader_writer_class().read_images([str(image)])
    (_, expected), (_, found) = (
        predictor.predict_single_npy_array(voxels, properties, save_or_return_probabilities=True)
        for predictor in (on_torch, OnnxPredictor(exported))
    )
    return float(np.abs(expected - found).max())


# ------------------------------------------------------------------------------------------------------------ report
def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(part: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Train unless there is a network, predict in both ways, print a row of the table, and return its faults."""
    task = TASKS[part]
    environment = {
        **{root: str(folder / root) for root in ROOTS},
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

    dataset = f"Dataset{task.number}_{part}"
    model = folder / "nnUNet_results" / dataset / f"nnUNetTrainer__nnUNetPlans__{task.configuration}"
    if not (model / f"fold_{FOLD}" / "checkpoint_final.pth").is_file():
        train(part, arguments, folder, run)
    named = ("-d", task.number, "-c", task.configuration, "-f", FOLD)
    run("nnUNetv2_export_onnx", *named, "-o", folder / "onnx")
    images = folder / "nnUNet_raw" / dataset / "imagesTs"
    on_torch = run(
        *("nnUNetv2_predict", *named, "-i", images, "-o", folder / "torch", "-device", "cpu", "--disable_progress_bar"),
        nnUNet_cpu_autocast="0",
    )
    with_onnx = run(
        "python", "-m", "nnunetv2.inference.onnx", "-m", folder / "onnx", "-i", images, "-o", folder / "predicted"
    )
    found = compare_maps(read_maps(folder / "torch", folder / "predicted", task.ending))
    difference = largest_difference(model, folder / "onnx", min(images.iterdir()))
    shares = ", ".join(f"{label}: {100 * share:.2f} %" for label, share in found.shares.items())
    print(
        f"| {part}, {task.configuration} | {len(list(images.iterdir()))} | {shares} | {100 * found.same:.4f} % "
        f"| {found.least_dice:.4f} | {difference:.1e} | {on_torch:.1f} s | {with_onnx:.1f} s "
        f"| {with_onnx / on_torch:.2f} |",
        flush=True,
    )
    return find_faults(found, with_onnx / on_torch)


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


def compare_tiles(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Print the time of all cores for a tile and the largest difference of logits, and return the faults."""
    import torch

    from nnunetv2.inference.onnx.network import OnnxNetwork
    from nnunetv2.model_sharing.onnx_export import export_to_onnx
    from nnunetv2.models.model_folder import load_model_folder
    from nnunetv2.models.networks import speed_up_on_cpu_
    from nnunetv2.utilities.plug_in_kinds import TRAINER

    torch.set_num_threads(arguments.threads)
    os.environ["nnUNet_cpu_autocast"] = "0"
    faults = []
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
            f"| a tile {'x'.join(map(str, patch))} of a network of {parameters:.0f} M, {name} | | | | | logits: "
            f"{np.abs(found - expected).max():.1e} | {on_torch:.2f} s | {with_onnx:.2f} s "
            f"| {with_onnx / on_torch:.2f} |",
            flush=True,
        )
        if with_onnx > MOST_TIME * on_torch:
            faults.append(f"{name}: ONNX takes {with_onnx / on_torch:.2f} times the time of torch")
    return faults


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
    parser.add_argument("--folder", type=Path, help="keep the networks here, and take those that are here already")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these only")
    parser.add_argument("--epochs", type=int, help=f"of {ITERATIONS} iterations; default: as many as the task takes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    print(
        "| model | cases | predicted labels | voxels with the same label | lowest Dice of a label "
        "| largest difference of probabilities | torch, float32 | ONNX | ratio |\n" + 9 * "|---" + "|",
        flush=True,
    )
    faults = []
    for part in arguments.only:
        is_kept = arguments.folder is not None and part != "tiles"
        with nullcontext(arguments.folder) if is_kept else TemporaryDirectory() as root:
            folder = Path(root, part).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            of_part = (compare_tiles if part == "tiles" else partial(compare, part))(arguments, folder)
            faults += [f"{part}: {fault}" for fault in of_part]
    print(*faults, sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
