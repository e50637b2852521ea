"""Compare two versions of the package bit by bit: python -m benchmarks.same_bits BEFORE AFTER [--folder FOLDER]

BEFORE and AFTER are folders of commands (`.venv/bin` of two checkouts). Both get the same phantom scans and the same
seed; three sites plan together, preprocess, train two epochs of ten steps over real HTTP, and predict. A table says of
every product whether both versions made the same values: fingerprints, plans, preprocessed cases, checkpoints of the
sites, aggregates of the coordinator, label maps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from demo.phantoms import Scanner, write_dataset

SITES = {
    "301": Scanner(spacing_mm=(1.25, 1.25, 1.25), intensities=(300, 520, 760), noise=0.25, bias=0.10),
    "302": Scanner(spacing_mm=(1.6, 1.0, 1.0), intensities=(60, 95, 130), noise=0.40, bias=0.05),
    "303": Scanner(spacing_mm=(2.0, 1.25, 1.25), intensities=(900, 1500, 2300), noise=0.15, bias=0.20),
}
ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
COORDINATOR_OPTIONS = "--epochs 2 --iterations 10 --val-iterations 2"
SEED = "12345"


def run_version(commands: Path, raw: Path, folder: Path) -> None:
    """Plan, preprocess, train and predict with one version, everything below `folder`."""
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "nnUNet_seed": SEED,
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
        **{root: str(raw if root == "nnUNet_raw" else folder / root) for root in ROOTS},
    }
    environment.pop("PYTHONPATH", None)
    for root in ROOTS[1:]:
        (folder / root).mkdir(parents=True)

    def run(*command: str) -> None:
        done = subprocess.run(
            [str(commands / command[0]), *command[1:]], env=environment, cwd=folder, text=True, capture_output=True
        )
        (folder / "log.txt").open("a").write(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"{commands / command[0]} failed; see {folder / 'log.txt'}")

    run(
        "nnUNetv2_fed_simulate",
        "-d",
        *SITES,
        "-device",
        "cpu",
        "--folder",
        "federation",
        "--coordinator_options",
        COORDINATOR_OPTIONS,
    )
    model = next((folder / "federation" / "coordinator" / "models").glob("*/plans.json")).parent
    for site in SITES:
        run(
            "nnUNetv2_predict_from_modelfolder",
            "-m",
            str(model),
            "-f",
            "0",
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
            "-i",
            str(raw / f"Dataset{site}_Phantom" / "imagesTs"),
            "-o",
            str(folder / "predictions" / site),
            "--disable_progress_bar",
        )


def digests(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and digest of every product of a version."""
    readers: list[tuple[str, str, Callable[[Path], str]]] = [
        ("fingerprint", "nnUNet_preprocessed/*/dataset_fingerprint*.json", _digest_of_json),
        ("plans", "nnUNet_preprocessed/*/nnUNetPlans.json", _digest_of_json),
        ("preprocessed case", "nnUNet_preprocessed/*/nnUNetPlans_*/*.b2nd", _digest_of_b2nd),
        ("checkpoint of a site", "nnUNet_results/*/*/fold_*/checkpoint_*.pth", _digest_of_checkpoint),
        ("aggregate", "federation/coordinator/models/*/fold_*/checkpoint_*.pth", _digest_of_checkpoint),
        ("label map", "predictions/*/*.nii.gz", _digest_of_image),
    ]
    for kind, pattern, digest in readers:
        for path in sorted(folder.glob(pattern)):
            yield kind, str(path.relative_to(folder)), digest(path)


def _digest_of_json(path: Path) -> str:
    return hashlib.sha256(json.dumps(json.loads(path.read_text()), sort_keys=True).encode()).hexdigest()


def _digest_of_b2nd(path: Path) -> str:
    import blosc2

    array = blosc2.open(urlpath=str(path), mode="r")[:]
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


def _digest_of_checkpoint(path: Path) -> str:
    import torch

    weights = torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_image(path: Path) -> str:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    geometry = (image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    return hashlib.sha256(str(geometry).encode() + sitk.GetArrayViewFromImage(image).tobytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run both versions and print the table; status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the commands of one version")
    parser.add_argument("after", type=Path, help="folder of the commands of the other")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        raw = folder / "nnUNet_raw"
        shutil.rmtree(raw, ignore_errors=True)
        for seed, (site, scanner) in enumerate(SITES.items()):
            write_dataset(raw / f"Dataset{site}_Phantom", scanner, num_train=10, num_test=2, seed=seed)
        products: list[dict[tuple[str, str], str]] = []
        for version in ("before", "after"):
            shutil.rmtree(folder / version, ignore_errors=True)
            run_version(getattr(arguments, version).absolute(), raw, folder / version)
            products.append({(kind, name): digest for kind, name, digest in digests(folder / version)})
    before, after = products
    is_same = bool(before)
    print("| product | compared | same |\n|---|---|---|")
    for kind in dict.fromkeys(kind for kind, _ in {**before, **after}):
        names = sorted(name for one, name in {**before, **after} if one == kind)
        same = [name for name in names if before.get((kind, name)) == after.get((kind, name))]
        print(f"| {kind} | {len(names)} | {len(same)} |")
        for name in sorted(set(names) - set(same)):
            is_same = False
            print(f"differs: {name}")
    return 0 if is_same else 1


if __name__ == "__main__":
    raise SystemExit(main())
