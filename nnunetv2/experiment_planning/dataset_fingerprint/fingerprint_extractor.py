"""Turn a raw dataset into its fingerprint, the file `dataset_fingerprint.json` that planning starts from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import (
    SEED,
    CaseSample,
    read_cropped_case,
    sample_case,
)
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint import compute_fingerprint
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessed_data.bad_cases import list_training_cases
from nnunetv2.preprocessed_data.fingerprint_files import FINGERPRINT_FILE, count_cases
from nnunetv2.preprocessing.finite_values import require_finite
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.map_cases import map_cases_visibly

logger = logging.getLogger(__name__)


class DatasetFingerprintExtractor:
    """Extract the fingerprint of one dataset.

    To extend it, override `run`, or raise or lower `num_foreground_voxels_for_intensitystats`.

    Args:
        num_processes: Workers; 1 works in this process. None: as many as cores and free memory allow.
        verbose: Log a line per case in place of a progress bar.
    """

    def __init__(self, dataset_name_or_id: str | int, num_processes: int | None = 8, verbose: bool = False) -> None:
        self.dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
        self.input_folder = str(Path(nnUNet_raw) / self.dataset_name)
        self.output_folder = str(Path(nnUNet_preprocessed) / self.dataset_name)
        self.num_processes = num_processes
        self.verbose = verbose
        self.dataset_json = read_json(Path(self.input_folder) / "dataset.json")
        self.dataset = list_training_cases(self.input_folder, Path(self.output_folder), self.dataset_json)
        self.show_progress_bar = True
        # Shared out evenly among the cases, whatever their size, and drawn with replacement.
        self.num_foreground_voxels_for_intensitystats = 10e7

    def run(self, overwrite_existing: bool = False) -> dict:
        """Write and return the fingerprint, or return the existing one unless told to overwrite it.

        A fresh fingerprint numbers its channels with ints, one read from the file with strings.
        """
        file = Path(self.output_folder) / FINGERPRINT_FILE
        if file.is_file() and not overwrite_existing:
            return self._load(file)
        samples = self.sample_cases(self.num_samples_per_case(self.count_cases()))
        fingerprint = self.compute_fingerprint(samples)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_json_atomically(fingerprint, file)
        return fingerprint

    def count_cases(self) -> int:
        """Return the number of training cases of this dataset."""
        return len(self.dataset)

    def num_samples_per_case(self, num_cases: int) -> int:
        """Return how many voxels to draw per channel and case.

        There are `num_cases` in all.
        """
        if num_cases < 1:
            raise ValueError(f"{self.dataset_name} has no training cases in {self.input_folder}")
        num_samples = int(self.num_foreground_voxels_for_intensitystats // num_cases)
        if num_samples < 1:
            raise ValueError(
                f"{self.num_foreground_voxels_for_intensitystats} foreground voxels cannot be shared out "
                f"among {num_cases} cases"
            )
        return num_samples

    def sample_cases(self, num_samples_per_case: int) -> list[CaseSample]:
        """Sample all cases, in their order, with `num_processes` workers (1: in this process).

        Raises:
            CaseFailedError: A case cannot be read, its image and label do not fit, or its worker died.
        """
        reader = self._determine_reader()
        num_channels = len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])
        arguments = {
            str(case): (files["images"], files["label"], reader, num_samples_per_case, num_channels)
            for case, files in self.dataset.items()
        }
        samples = map_cases_visibly(
            sample_case,
            arguments,
            num_processes=self._choose_num_processes(),
            description="Fingerprint",
            show_progress=self.show_progress_bar,
            verbose=self.verbose,
        )
        self._report_cases_without_foreground(samples)
        return samples

    @staticmethod
    def compute_fingerprint(samples: Sequence[CaseSample]) -> dict:
        """Compute the fingerprint of samples, those of this dataset or of others as well."""
        return compute_fingerprint(samples)

    @staticmethod
    def collect_foreground_intensities(
        segmentation: np.ndarray, images: np.ndarray, seed: int = SEED, num_samples: int = 10000
    ) -> tuple[list, list[dict]]:
        """Draw foreground voxels with replacement and describe all of them, per channel.

        Args:
            segmentation: `(1, Z, Y, X)`; above 0 is foreground, the ignore label included.
            images: `(C, Z, Y, X)`.

        Returns:
            Per channel the drawn values (an empty list without foreground), and per channel a dict of statistics of
            all foreground values (NaN without foreground).
        """
        assert segmentation.ndim == 4 and images.ndim == 4, "label and image must be 4-dimensional, channel first"
        assert not np.isnan(segmentation).any(), "the label contains NaN"
        assert not np.isnan(images).any(), "the image contains NaN"
        generator = np.random.RandomState(seed)
        foreground = segmentation[0] > 0
        drawn, statistics = [], []
        for image in images:
            values = image[foreground]
            drawn.append(values[generator.randint(0, len(values), int(num_samples))] if len(values) else [])
            statistics.append(_describe(values))
        return drawn, statistics

    @staticmethod
    def analyze_case(
        image_files: Sequence[str], segmentation_file: str, reader_writer_class: type, num_samples: int = 10000
    ) -> tuple:
        """Read one case and crop it to its non-zero region.

        Returns:
            Shape after cropping, spacing, the two lists of `collect_foreground_intensities`, and the number of
            voxels after cropping divided by that before.
        """
        images, segmentation, spacing, relative_size = read_cropped_case(
            image_files, segmentation_file, reader_writer_class
        )
        require_finite(images)
        require_finite(segmentation, "label")
        drawn, statistics = DatasetFingerprintExtractor.collect_foreground_intensities(
            segmentation, images, num_samples=num_samples
        )
        return images.shape[1:], spacing, drawn, statistics, relative_size

    def _determine_reader(self) -> type:
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        if not self.dataset:
            raise ValueError(f"{self.dataset_name} has no training cases in {self.input_folder}")
        example = next(iter(self.dataset.values()))["images"][0]
        return determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=self.verbose)

    def _choose_num_processes(self) -> int:
        if self.num_processes is not None:
            return int(self.num_processes)
        from nnunetv2.preprocessing.worker_count import bytes_to_read, choose_num_processes

        files = [[*files["images"], files["label"]] for files in self.dataset.values()]
        return choose_num_processes(bytes_to_read(files), len(files))

    def _load(self, file: Path) -> dict:
        fingerprint = read_json(file)
        if count_cases(fingerprint) != self.count_cases():
            logger.warning(
                "%s describes %d cases, the dataset has %d now. Run again with --clean to renew it.",
                file,
                count_cases(fingerprint),
                self.count_cases(),
            )
        return fingerprint

    def _report_cases_without_foreground(self, samples: Sequence[CaseSample]) -> None:
        empty = [str(case) for case, sample in zip(self.dataset, samples) if not sample.has_foreground]
        if len(empty) == len(samples):
            raise ValueError(f"{self.dataset_name}: no case has foreground (a label above 0): {_enumerate(empty)}")
        if empty:
            logger.warning(
                "%s: %d of %d cases have no foreground and add no intensities: %s",
                self.dataset_name,
                len(empty),
                len(samples),
                _enumerate(empty),
            )


def _describe(values: np.ndarray) -> dict[str, float]:
    names = ("mean", "median", "min", "max", "percentile_99_5", "percentile_00_5")
    if not len(values):
        return dict.fromkeys(names, np.nan)
    low, median, high = np.percentile(values, [0.5, 50, 99.5])
    return dict(zip(names, (np.mean(values), median, np.min(values), np.max(values), high, low)))


def _enumerate(cases: Sequence[str], at_most: int = 20) -> str:
    return ", ".join(cases[:at_most]) + (f" and {len(cases) - at_most} more" if len(cases) > at_most else "")
