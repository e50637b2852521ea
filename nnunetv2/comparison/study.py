"""Describe a comparison as a value, written down for going on with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.comparison.arms import Arm
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.file_lock import lock_file
from nnunetv2.utilities.json_files import DATASET, read_json
from nnunetv2.utilities.plain_text import show

STUDY_FILE, LOCK_FILE = "study.json", "lock"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A raw dataset: a site, or an external one that is only tested on."""

    name: str
    folder: str
    """Its raw folder."""

    @property
    def number(self) -> int:
        """Its id."""
        return convert_dataset_name_to_id(self.name)

    def description(self) -> dict[str, Any]:
        """Return its dataset.json."""
        content: dict[str, Any] = read_json(
            Path(self.folder, "dataset.json"), required={**DATASET, "channel_names": dict, "file_ending": str}
        )
        return content


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that decides the numbers of a comparison."""

    sites: tuple[Dataset, ...]
    external: tuple[Dataset, ...] = ()
    arms: tuple[Arm, ...]
    seeds: int
    epochs: int
    iterations: int
    val_iterations: int
    configuration: str
    fold: str
    plans_name: str
    plans_patch: Mapping[str, Any] = field(default_factory=dict)
    """JSON merge patch (RFC 7396) of every plans file."""
    device: str

    @property
    def tested(self) -> tuple[Dataset, ...]:
        """All datasets with test cases."""
        return (*self.sites, *self.external)

    def as_json(self) -> dict[str, Any]:
        """Return the study as plain JSON."""
        return {"version": VERSION, **json.loads(json.dumps(asdict(self)))}


def find_datasets(names_or_ids: Iterable[str]) -> tuple[Dataset, ...]:
    """Find raw datasets by name or id."""
    names = [maybe_convert_to_dataset_name(one) for one in names_or_ids]
    return tuple(Dataset(name=name, folder=str(Path(nnUNet_raw.require(), name).resolve())) for name in names)


def check_study(study: Study) -> None:
    """Refuse a study whose datasets do not fit or lack test cases.

    Raises:
        ValueError: The message names the dataset and the fault.
    """
    numbers = [dataset.number for dataset in study.tested]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a dataset is named twice: {' '.join(one.name for one in study.tested)}")
    if len(study.sites) < 2:
        raise ValueError("a comparison needs two sites or more: name their datasets with -d")
    for what in ("seeds", "epochs", "iterations", "val_iterations"):
        if getattr(study, what) < 1:
            raise ValueError(f"--{what} must be 1 or more, it is {getattr(study, what)}")
    first = study.sites[0].description()
    for dataset in study.tested:
        content = dataset.description()
        for key in ("labels", "channel_names", "file_ending"):
            if content[key] != first[key]:
                raise ValueError(
                    f"{dataset.name} has {key} {content[key]}, {study.sites[0].name} has {first[key]}. Remedy: give "
                    "all datasets of a comparison the same, names and values alike"
                )
    names = {dataset.name for dataset in study.sites}
    for arm in study.arms:
        if unknown := sorted(arm.planning_options_of.keys() - names):
            raise ValueError(
                f"arm {arm.name} gives planning options of {unknown[0]}, which is no site of this comparison: "
                f"{', '.join(sorted(names))}"
            )
    without = [dataset.name for dataset in study.tested if not list_test_cases(dataset)]
    for name in without if len(without) < len(study.tested) else ():
        show(f"{name} has no test cases in imagesTs and labelsTs: its models are tested elsewhere only")
    if len(without) == len(study.tested):
        raise ValueError(
            f"no dataset has test cases: put images that no training sees into {study.sites[0].folder}/imagesTs and "
            "their labels into labelsTs, and so for the others"
        )


def list_test_cases(dataset: Dataset) -> dict[str, tuple[list[Path], Path]]:
    """Return the test cases of a dataset: case -> (a file per channel, label).

    One file may hold all channels (colour photographs), if it does so for every case, as everywhere in nnU-Net.

    Raises:
        ValueError: A label is missing, or an image has another number of channels than the dataset.
    """
    content = dataset.description()
    ending, folder = content["file_ending"], Path(dataset.folder)
    has_colours = not any((folder / "imagesTs").glob(f"*_0001{ending}"))
    num_files = 1 if has_colours else len(content["channel_names"])
    cases: dict[str, tuple[list[Path], Path]] = {}
    firsts = sorted((folder / "imagesTs").glob(f"*_0000{ending}")) if (folder / "imagesTs").is_dir() else []
    for file in firsts:
        case = file.name[: -len(f"_0000{ending}")]
        images = [folder / "imagesTs" / f"{case}_{channel:04d}{ending}" for channel in range(num_files)]
        label = folder / "labelsTs" / f"{case}{ending}"
        if missing := [str(one) for one in (*images, label) if not one.is_file()]:
            raise ValueError(f"{dataset.name}: test case {case} lacks {missing[0]}")
        cases[case] = (images, label)
    return cases


@contextmanager
def open_study(folder: Path, study: Study, *, go_on: bool) -> Iterator[None]:
    """Write a study down, or check it, and keep other commands out of its folder.

    Arms and seeds that the folder has from earlier commands stay written down beside those of now.

    Raises:
        ValueError: The folder holds a study and `go_on` is not set, or another study (the message names the
            difference), or another command is at work there.
    """
    file = folder / STUDY_FILE
    if not file.exists() and folder.is_dir() and any(one.name != LOCK_FILE for one in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no comparison: choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        now = study.as_json()
        if file.exists():
            if not go_on:
                raise ValueError(f"{folder} holds a comparison already: go on with --c, or choose another --folder")
            held = read_json(file)
            _check_same(file, held, now)
            present = {arm["name"] for arm in now["arms"]}
            earlier = [arm for arm in held["arms"] if arm["name"] not in present]
            now = {**now, "arms": [*earlier, *now["arms"]], "seeds": max(held["seeds"], now["seeds"])}
        save_json_atomically(now, file, sort_keys=False)
        yield


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with (folder / LOCK_FILE).open("w") as file:
        try:
            lock_file(file.fileno())
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another nnUNetv2_fed_compare: wait until it ends") from None
        yield


def _check_same(file: Path, held: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in now:
        if key not in ("arms", "seeds") and held.get(key) != now[key]:
            raise ValueError(
                f"{file} was begun with {key} {held.get(key)}, now it is {now[key]}. Remedy: give the same options, or "
                "choose another --folder"
            )
    check_arms(file, held["arms"], now["arms"])


def check_arms(file: Path, held: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an arm that has changed; arms and seeds may be added later.

    A comparison that an earlier version began does not say of its arms that all sites plan alike.

    Raises:
        ValueError: The message names the file and the arm.
    """
    before = {arm["name"]: {"networks": "equal", "planning_options_of": {}, **arm} for arm in held}
    for arm in now:
        if before.get(arm["name"], arm) != arm:
            raise ValueError(
                f"{file} was begun with another arm {arm['name']}: give the changed one another name in --arms_file"
            )
