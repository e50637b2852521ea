"""Let two versions of the package train together: python -m benchmarks.mixed_versions OLD NEW [--folder FOLDER]

OLD and NEW are folders of commands (`.venv/bin` of two checkouts). Three sites plan, train two rounds and fetch the
model, with every combination of versions at the coordinator and at the sites. Once more they plan with the old version
and train with the new one, whose coordinator goes on with the old one's folder, verifies its log, makes a backup and
restores it. All must end with the same results, byte by byte. At last, sites of the old version are invited to a
federation of the new one that masks updates; what they say is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.same_bits import ROOTS, SEED, SITES, _digest_of_checkpoint
from demo.phantoms import write_dataset
from nnunetv2.federated.commands import simulate

# Versions have other defaults for how tensors are matched.
OPTIONS = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1", "--matching", "name")
ENVIRONMENT = {"nnUNet_seed": SEED, "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1", "nnUNet_fed_min_cases": "1"}


@contextmanager
def versions(*, coordinator: Path, sites: Path) -> Iterator[None]:
    """Take the coordinator's command from one folder and those of the sites from another."""

    def find_command(name: str) -> str:
        return str((coordinator if name == "nnUNetv2_fed_coordinator" else sites) / name)

    with patch.object(simulate, "find_command", find_command), patch.dict(os.environ, ENVIRONMENT):
        yield


def make_sites(folder: Path, raw: Path) -> list[simulate.LocalSite]:
    """Give each site folders of its own below an emptied one; all read the same raw data."""
    shutil.rmtree(folder, ignore_errors=True)
    sites = []
    for dataset in SITES:
        roots = {root: str(raw if root == "nnUNet_raw" else folder / dataset / root) for root in ROOTS}
        for path in roots.values():
            Path(path).mkdir(parents=True, exist_ok=True)
        sites.append(
            simulate.LocalSite(
                name=f"site{dataset}", dataset=dataset, credential=folder / f"{dataset}.json", environment=roots
            )
        )
    return sites


def plan_and_train(folder: Path, sites: Sequence[simulate.LocalSite], steps: Sequence[str] = ("plan", "train")) -> None:
    """Run a coordinator and let the sites plan, train, or both."""
    commands = {
        "plan": ["nnUNetv2_plan_and_preprocess", "--federated", "-c", "3d_fullres", "-np", "1", "-npfp", "1", "-d"],
        "train": ["nnUNetv2_train", "-tr", "nnUNetTrainerAsymFedAvg", "-device", "cpu"],
    }
    rest = {"plan": [], "train": ["3d_fullres", "0"]}
    with simulate.running_coordinator(folder / "coordinator", sites, OPTIONS, show=lambda line: None):
        for step in steps:
            simulate.run_everywhere(
                sites,
                lambda site, step=step: [*commands[step], site.dataset, *rest[step]],
                step=step,
                log_folder=folder / "logs",
                show=lambda line: None,
            )


def run_together(folder: Path, raw: Path, *, coordinator: Path, sites: Path) -> dict[str, str]:
    """Plan and train at three sites; return the digest of everything that the coordinator has computed."""
    with versions(coordinator=coordinator, sites=sites):
        plan_and_train(folder, make_sites(folder, raw))
    return dict(digests(folder / "coordinator"))


def run_one_after_the_other(folder: Path, raw: Path, *, first: Path, then: Path) -> dict[str, str]:
    """Plan with one version and train with another; return the digests as `run_together` does."""
    sites = make_sites(folder, raw)
    for commands, step in ((first, "plan"), (then, "train")):
        with versions(coordinator=commands, sites=commands):
            plan_and_train(folder, sites, [step])
    return dict(digests(folder / "coordinator"))


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and digest of the results and models in a coordinator's folder."""
    for path in sorted((folder / "gatherings").rglob("result*")):
        yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((folder / "models").rglob("*.pth")):
        yield str(path.relative_to(folder)), _digest_of_checkpoint(path)


def look_after(folder: Path, commands: Path) -> None:
    """Verify the log of a federation, save it and restore the backup with these commands."""
    backup = folder.with_name("backup.tar")
    for words in (
        ["--folder", str(folder), "verify-log"],
        ["--folder", str(folder), "backup", str(backup)],
        ["restore", str(backup), str(folder.with_name("restored"))],
        ["--folder", str(folder.with_name("restored")), "verify-log"],
    ):
        subprocess.run([str(commands / "nnUNetv2_fed_admin"), *words], check=True, capture_output=True, text=True)


def meet_masks(folder: Path, raw: Path, *, coordinator: Path, sites: Path) -> str:
    """Invite sites to a federation that masks updates; return what is said of it."""
    with versions(coordinator=coordinator, sites=sites):
        try:
            invited = make_sites(folder, raw)
            with simulate.running_coordinator(
                folder / "coordinator", invited, [*OPTIONS, "--secure"], show=lambda line: None
            ):
                return "they join it"
        except simulate.SimulationError as error:
            return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every combination and print whether all ended alike; status 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of the commands of one version")
    parser.add_argument("new", type=Path, help="folder of the commands of the other")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        raw = folder / "nnUNet_raw"
        shutil.rmtree(raw, ignore_errors=True)
        for seed, (site, scanner) in enumerate(SITES.items()):
            write_dataset(raw / f"Dataset{site}_Phantom", scanner, num_train=10, num_test=1, seed=seed)
        for coordinator in ("old", "new"):
            for sites in ("old", "new"):
                name = f"{coordinator} coordinator, {sites} sites"
                found[name] = run_together(
                    folder / f"{coordinator}-{sites}",
                    raw,
                    coordinator=getattr(arguments, coordinator).absolute(),
                    sites=getattr(arguments, sites).absolute(),
                )
        found["old, then new"] = run_one_after_the_other(
            folder / "continued", raw, first=arguments.old.absolute(), then=arguments.new.absolute()
        )
        look_after(folder / "continued" / "coordinator", arguments.new.absolute())
        said = meet_masks(folder / "masked", raw, coordinator=arguments.new.absolute(), sites=arguments.old.absolute())
    reference = next(iter(found.values()))
    print("| versions | results and models | as the first line |\n|---|---|---|")
    for name, results in found.items():
        same = sum(results.get(key) == digest for key, digest in reference.items())
        print(f"| {name} | {len(results)} | {same} of {len(reference)} |")
        for key in sorted(reference.keys() | results.keys()):
            if reference.get(key) != results.get(key):
                print(f"differs: {key}")
    print("The new version verified, saved and restored the old one's federation.")
    print(f"Sites of the old version that are invited to a federation with masks: {said}")
    return 0 if all(results == reference for results in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
