"""Lay out the folder of a comparison.

It has links to the raw data, all cases in one dataset, and all test cases in one folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.comparison.study import Dataset, Study, list_test_cases
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

UNFINISHED = ".unfinished"
"""Ending of a folder that is being made. It is renamed when it is whole, so a name without it is always whole."""


@dataclass(frozen=True)
class StudyFolder:
    """The paths of a comparison."""

    path: Path

    @property
    def raw(self) -> Path:
        """The nnUNet_raw of all trainings."""
        return self.path / "nnUNet_raw"

    @property
    def tests(self) -> Path:
        """Test cases of all datasets, `images` and `labels`; names begin with the dataset's number."""
        return self.path / "tests"

    @property
    def logs(self) -> Path:
        """The output of every command."""
        return self.path / "logs"

    def planned(self, plan_group: str) -> Path:
        """Return the nnUNet_preprocessed of the arms that plan alike."""
        return self.path / "planned" / plan_group

    def trained(self, arm: str, seed: int) -> Path:
        """Return the nnUNet_results of an arm's trainings with a seed."""
        return self.path / "trained" / arm / f"seed_{seed}"

    def predicted(self, arm: str, seed: int, model: str) -> Path:
        """Return the predictions and scores of a model."""
        return self.path / "predicted" / arm / f"seed_{seed}" / model


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path | None]:
    """Yield a fresh folder that gets this name when the block has succeeded.

    It is None if the folder exists already.


    Every attempt has a folder of its own: processes of an interrupted one that still write disturb nobody.
    """
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f"{folder.name}.*{UNFINISHED}"):
        shutil.rmtree(old, ignore_errors=True)
    attempt = folder.with_name(f"{folder.name}.{os.getpid()}{UNFINISHED}")
    attempt.mkdir()
    yield attempt
    attempt.rename(folder)


def pooled_dataset(study: Study) -> str:
    """Return the name of the dataset that holds the training cases of all sites."""
    taken = {dataset.number for dataset in study.tested}
    number = next(number for number in range(999, 0, -1) if number not in taken)
    return f"Dataset{number:03d}_Pooled"


def test_case_name(dataset: Dataset, case: str) -> str:
    """Return the name of a test case among those of all datasets."""
    return f"{dataset.number:03d}_{case}"


def list_tests(study: Study) -> dict[int, frozenset[str]]:
    """Return the test cases: number of the dataset -> names among those of all datasets."""
    return {
        dataset.number: frozenset(test_case_name(dataset, case) for case in list_test_cases(dataset))
        for dataset in study.tested
    }


def link_datasets(study: Study, folder: StudyFolder) -> None:
    """Make the raw root: links to all sites' datasets, and one of all cases."""
    with whole_or_nothing(folder.raw) as raw:
        if raw is None:
            return
        for dataset in study.sites:
            (raw / dataset.name).symlink_to(dataset.folder, target_is_directory=True)
        entries = {}
        for dataset in study.sites:
            for case, entry in get_filenames_of_train_images_and_targets(dataset.folder).items():
                entries[test_case_name(dataset, case)] = {"images": entry["images"], "label": entry["label"]}
        pooled = raw / pooled_dataset(study)
        pooled.mkdir()
        content = {key: value for key, value in study.sites[0].description().items() if key != "dataset"}
        save_json_atomically({**content, "numTraining": len(entries), "dataset": entries}, pooled / "dataset.json")


def link_tests(study: Study, folder: StudyFolder) -> None:
    """Put the test cases of all datasets side by side."""
    with whole_or_nothing(folder.tests) as tests:
        if tests is None:
            return
        (tests / "images").mkdir()
        (tests / "labels").mkdir()
        for dataset in study.tested:
            ending = dataset.description()["file_ending"]
            for case, (images, label) in list_test_cases(dataset).items():
                name = test_case_name(dataset, case)
                for channel, image in enumerate(images):
                    (tests / "images" / f"{name}_{channel:04d}{ending}").symlink_to(image.resolve())
                (tests / "labels" / f"{name}{ending}").symlink_to(label.resolve())
